"""Which nodes of a session fell back to the CPU from the provider that was asked for."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import onnx

from onnxlr.errors import ModelError
from onnxlr.system.runtime import import_runtime

Node = tuple[str, str]  # its operator and its name

_RECORD = "session.record_ep_graph_assignment_info"
_CPU = "CPUExecutionProvider"
_NAMED = 3  # nodes that a message names; the others are counted
_LOG_VERBOSE = 0
# How ONNX Runtime logs it: where all nodes went, or where some did and then each of them.
_PLACED = re.compile(r"VerifyEachNodeIsAssignedToAnEp\] +(All nodes|Node\(s\)) placed on \[(\w+)\]")
_LOGGED_NODE = re.compile(r"VerifyEachNodeIsAssignedToAnEp\] +(\w+) \((.*)\)$")
_FLOATS = frozenset(
    getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")
)


def can_record() -> bool:
    """Whether this ONNX Runtime tells of a session where its nodes run."""
    return hasattr(import_runtime().InferenceSession, "get_provider_graph_assignment_info")


def record_placement(settings: Any) -> None:
    """Have a session tell where its nodes run: recorded, or logged where it can't record it."""
    if can_record():
        settings.add_session_config_entry(_RECORD, "1")
    else:
        settings.log_severity_level = _LOG_VERBOSE


def check_placement(
    raw: Any, log: str, content: bytes | str, label: str, providers: Sequence[str]
) -> None:
    """Refuse a session some of whose nodes fell back to the CPU.

    Parameters
    ----------
    raw : onnxruntime.InferenceSession
    log : str
        What it logged, where it can't record.
    content : bytes or str
        The model, or the path of its file.
    label : str
        What messages call the model.
    providers : sequence of str
        The short names of those that were asked for.

    Raises
    ------
    ModelError
        If nodes run on the CPU that compute with floating-point numbers: providers leave the
        arithmetic of shapes to it on purpose.
    """
    on_cpu = _recorded(raw) if can_record() else _logged(log)
    if on_cpu is not None and not on_cpu:
        return
    model = _outline(content)
    is_float = _float_nodes(model)
    on_cpu = on_cpu if on_cpu is not None else list(is_float)
    by_operator: dict[str, bool] = {}
    for (operator, _), floats in is_float.items():
        by_operator[operator] = by_operator.get(operator, False) or floats
    # A node that the runtime made is judged by its operator's others.
    fallen = [n for n in on_cpu if is_float.get(n, by_operator.get(n[0], True))]
    if fallen:
        count = "1 node" if len(fallen) == 1 else f"{len(fallen)} nodes"
        named = ", ".join(f"{op} {name!r}" for op, name in fallen[:_NAMED])
        more = f" and {len(fallen) - _NAMED} more" if len(fallen) > _NAMED else ""
        names = ",".join(providers)
        raise ModelError(
            f"{label} falls back: {count} would run on the CPU in place of {names}, {named}{more}; "
            f"--provider {names},cpu allows it"
        )


def _recorded(raw: Any) -> list[Node]:
    return [
        (node.op_type, node.name)
        for part in raw.get_provider_graph_assignment_info()
        if part.ep_name == _CPU
        for node in part.get_nodes()
    ]


def _logged(log: str) -> list[Node] | None:
    """The nodes on the CPU by a log; None if that are all."""
    nodes, on_cpu = [], False
    for line in log.splitlines():
        if placed := _PLACED.search(line):
            on_cpu = placed[2] == _CPU
            if on_cpu and placed[1] == "All nodes":
                return None
        elif on_cpu and (node := _LOGGED_NODE.search(line)):
            nodes.append((node[1], node[2]))
    return nodes


def _outline(content: bytes | str) -> onnx.ModelProto:
    """A model without its external data, with the types of its values as far as they are known."""
    if isinstance(content, bytes):
        model = onnx.load_model_from_string(content)
    else:
        model = onnx.load(content, load_external_data=False)
    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # too large, or with operators that the onnx package doesn't know
        return model


def _float_nodes(model: onnx.ModelProto) -> dict[Node, bool]:
    """Every node, and whether it gives floating-point numbers, as far as it is known."""
    found = {}
    for graph in _graphs(model.graph):
        values = (*graph.value_info, *graph.output)
        types = {v.name: v.type.tensor_type.elem_type for v in values}
        for node in graph.node:
            outputs = [types.get(name, onnx.TensorProto.FLOAT) for name in node.output if name]
            found[node.op_type, node.name] = any(t in _FLOATS for t in outputs)
    return found


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
