"""How a model's nodes hang together: what reads what, in which order, and functions that end."""

from collections import Counter
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from onnxlr.errors import ModelError
from onnxlr.model.checks import OLDEST_OPSET, ONNX_DOMAINS

_MOST_NODES = 1_000_000  # with every call replaced by its body; the largest exports have 100,000
_DEEPEST = 5_000  # calls within calls: runtimes follow them on a stack


def check_topology(model: ir.Model, label: str) -> None:
    """Refuse values that nothing produces, cycles, and functions without end.

    What is merely out of order is sorted.
    """
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OLDEST_OPSET))
    _check_functions(model, label)
    for graph in (model.graph, *model.graph.subgraphs()):
        _check_graph(graph, version, label)
    for function in model.functions.values():
        own = function.opset_imports.get("", function.opset_imports.get("ai.onnx", version))
        for graph in (function.graph, *function.subgraphs()):
            _check_graph(graph, own, label)


def _check_graph(graph: ir.Graph, version: int, label: str) -> None:
    order = {node: i for i, node in enumerate(graph)}
    sorted_ = True
    for node, i in order.items():
        _check_arity(node, version, label)
        for value in node.inputs:
            if value is not None and not _has_source(value):
                raise ModelError(
                    f"{label}: {node.op_type} {node.name or '(unnamed)'!r} reads "
                    f"{value.name!r}, which nothing produces"
                )
        for value in _read(node):
            producer = value.producer()
            if producer is not None and (producer.graph is graph or not producer.graph):
                sorted_ = sorted_ and order.get(producer, i) < i
    for value in graph.outputs:
        if not value.name or not _has_source(value):
            raise ModelError(f"{label}: nothing produces the output {value.name!r}")
    if not sorted_:
        try:
            graph.sort()
        except ValueError:
            raise ModelError(f"{label}: its nodes form a cycle") from None


def _has_source(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its bodies included."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        yield from (value for value in current.inputs if value is not None)
        for attribute in current.attributes.values():
            if attribute.is_ref():
                continue
            bodies: tuple[ir.Graph, ...] = ()
            if attribute.type == ir.AttributeType.GRAPH:
                bodies = (attribute.as_graph(),)
            elif attribute.type == ir.AttributeType.GRAPHS:
                bodies = tuple(attribute.as_graphs())
            for body in bodies:
                waiting += body
                yield from body.outputs


def _check_arity(node: ir.Node, version: int, label: str) -> None:
    """Refuse a standard operator that lacks an input it can't do without, or its output."""
    if node.domain not in ONNX_DOMAINS or not onnx.defs.has(node.op_type, version):
        return
    schema = onnx.defs.get_schema(node.op_type, version)
    where = f"{label}: {node.op_type} {node.name or '(unnamed)'!r}"
    for word, values, least, most in (
        ("inputs", node.inputs, schema.min_input, schema.max_input),
        ("outputs", node.outputs, schema.min_output, schema.max_output),
    ):
        if len(values) < least:
            raise ModelError(f"{where} has {len(values)} {word}, it needs {least}")
        if len(values) > most:
            raise ModelError(f"{where} has {len(values)} {word}, it takes at most {most}")
    for i, value in enumerate(node.inputs):
        slot = schema.inputs[min(i, len(schema.inputs) - 1)]  # the last may stand for several
        if value is None and slot.option != onnx.defs.OpSchema.FormalParameterOption.Optional:
            raise ModelError(f"{where} has no {slot.name!r}, its input {i}")


def _check_functions(model: ir.Model, label: str) -> None:
    """Refuse functions that call each other in a circle, too deep, or expand beyond bounds."""
    depths: dict[ir.OperatorIdentifier, int] = {}
    waiting: list[tuple[ir.OperatorIdentifier, bool]] = [(key, False) for key in model.functions]
    open_: set[ir.OperatorIdentifier] = set()
    while waiting:  # no recursion of our own: calls may be nested deeper than Python's stack
        key, done = waiting.pop()
        called = [k for k in _called(model.functions[key]) if k in model.functions]
        if done:
            depths[key] = 1 + max((depths[inner] for inner in called), default=0)
            open_.discard(key)
        elif key in open_:
            raise ModelError(
                f"{label}: the local function {key[1]!r} calls itself, which ONNX has no place "
                "for: export it without functions"
            )
        elif key not in depths:
            open_.add(key)
            waiting.append((key, True))
            waiting += [(inner, False) for inner in called]
    if expanded_node_count(model) > _MOST_NODES:
        raise ModelError(
            f"{label}: its local functions expand to more than {_MOST_NODES:,} nodes: export it "
            "without functions, or in parts"
        )
    if (deepest := max(depths.values(), default=0)) > _DEEPEST:
        raise ModelError(
            f"{label}: its local functions call each other {deepest:,} deep: export it without "
            "functions"
        )


def call_counts(model: ir.Model) -> dict[ir.OperatorIdentifier, int]:
    """How often each function is called where every call is followed; ``check_wiring`` comes first.

    A function that is never called is absent.
    """
    order: dict[ir.OperatorIdentifier, None] = {}  # callees before their callers
    waiting = list(model.functions)
    while waiting:
        missing = [
            key
            for key in _called(model.functions[waiting[-1]])
            if key in model.functions and key not in order
        ]
        if missing:
            waiting += missing
        else:
            order[waiting.pop()] = None
    found = Counter(node.op_identifier() for node in model.graph.all_nodes())
    for key in reversed(order):
        if times := found[key]:
            for inner, count in Counter(_called(model.functions[key])).items():
                found[inner] += times * count
    return {key: found[key] for key in order if found[key]}


def expanded_node_count(model: ir.Model) -> int:
    """Nodes of a model with every call replaced by its body."""
    inner = sum((len(_called(model.functions[k])) - 1) * n for k, n in call_counts(model).items())
    return sum(1 for _ in model.graph.all_nodes()) + inner


def _called(function: ir.Function) -> list[ir.OperatorIdentifier]:
    return [node.op_identifier() for node in function.all_nodes()]
