"""Checks of how nodes are connected: every value has a source, no cycles, functions that end."""

from collections import Counter
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from onnxlr.errors import ModelError
from onnxlr.model.checks import OLDEST_OPSET, ONNX_DOMAINS

# Nodes of a model with every call replaced by its body; the largest exports have 100,000.
_MOST_NODES = 1_000_000
_DEEPEST = 5_000  # levels of calls within calls, which runtimes follow on a stack


def check_topology(model: ir.Model, label: str) -> None:
    """Refuse values that nothing produces, cycles of nodes, and functions that call themselves.

    So are inputs that share a name.

    Nodes that are merely out of order are sorted.

    Raises
    ------
    ModelError
        For the first of them.
    """
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OLDEST_OPSET))
    _check_functions(model, label)
    for graph in (model.graph, *model.graph.subgraphs()):
        _check_graph(graph, version, label)
    for function in model.functions.values():
        imports = function.opset_imports
        function_version = imports.get("", imports.get("ai.onnx", version))
        for graph in (function.graph, *function.subgraphs()):
            _check_graph(graph, function_version, label)


def _check_graph(graph: ir.Graph, version: int, label: str) -> None:
    inputs = Counter(value.name for value in graph.inputs)
    if twice := [name for name, count in inputs.items() if count > 1]:
        raise ModelError(f"{label}: {inputs[twice[0]]} of its inputs are called {twice[0]!r}")
    positions = {node: i for i, node in enumerate(graph)}
    in_order = True
    for node, i in positions.items():
        _check_arity(node, version, label)
        for value in node.inputs:
            if value is not None and not _has_source(value):
                raise ModelError(
                    f"{label}: {node.op_type} {node.name or '(unnamed)'!r} reads "
                    f"{value.name!r}, which nothing produces"
                )
        for value in _values_read(node):
            producer = value.producer()
            if producer is not None and (producer.graph is graph or not producer.graph):
                in_order = in_order and positions.get(producer, i) < i
    for value in graph.outputs:
        if not value.name or not _has_source(value):
            raise ModelError(f"{label}: nothing produces the output {value.name!r}")
    if not in_order:
        try:
            graph.sort()
        except ValueError:
            raise ModelError(f"{label}: its nodes form a cycle") from None


def _has_source(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _values_read(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node reads, and those that its bodies read."""
    stack = [node]
    while stack:
        current = stack.pop()
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
                stack += body
                yield from body.outputs


def _check_arity(node: ir.Node, version: int, label: str) -> None:
    """Refuse a standard operator with too few or too many inputs or outputs, by its schema."""
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
        slot = schema.inputs[min(i, len(schema.inputs) - 1)]  # the last one may be variadic
        if value is None and slot.option != onnx.defs.OpSchema.FormalParameterOption.Optional:
            raise ModelError(f"{where} has no {slot.name!r}, its input {i}")


def _check_functions(model: ir.Model, label: str) -> None:
    """Refuse functions that call each other in a circle, too deep, or expand to too many nodes."""
    depths: dict[ir.OperatorIdentifier, int] = {}
    stack: list[tuple[ir.OperatorIdentifier, bool]] = [(key, False) for key in model.functions]
    on_path: set[ir.OperatorIdentifier] = set()
    while stack:  # no recursion: calls may be nested deeper than Python's stack
        key, callees_done = stack.pop()
        callees = [k for k in _operators(model.functions[key]) if k in model.functions]
        if callees_done:
            depths[key] = 1 + max((depths[callee] for callee in callees), default=0)
            on_path.discard(key)
        elif key in on_path:
            raise ModelError(
                f"{label}: the local function {key[1]!r} calls itself, which ONNX doesn't "
                "allow: export it without functions"
            )
        elif key not in depths:
            on_path.add(key)
            stack.append((key, True))
            stack += [(callee, False) for callee in callees]
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
    """How often each function is called when every call is followed; uncalled ones are absent.

    ``check_topology`` must have refused functions that call themselves.
    """
    order: dict[ir.OperatorIdentifier, None] = {}  # callees before their callers
    stack = list(model.functions)
    while stack:
        callees = [
            key
            for key in _operators(model.functions[stack[-1]])
            if key in model.functions and key not in order
        ]
        if callees:
            stack += callees
        else:
            order[stack.pop()] = None
    counts = Counter(node.op_identifier() for node in model.graph.all_nodes())
    for key in reversed(order):
        if times := counts[key]:
            for inner, count in Counter(_operators(model.functions[key])).items():
                counts[inner] += times * count
    return {key: counts[key] for key in order if counts[key]}


def expanded_node_count(model: ir.Model) -> int:
    """Number of nodes of a model with every call replaced by its body."""
    in_functions = sum(
        (len(_operators(model.functions[key])) - 1) * times
        for key, times in call_counts(model).items()
    )
    return sum(1 for _ in model.graph.all_nodes()) + in_functions


def _operators(function: ir.Function) -> list[ir.OperatorIdentifier]:
    """The operator or function of each node in a function, its bodies included."""
    return [node.op_identifier() for node in function.all_nodes()]
