"""Values in the bodies of If, Loop and Scan made outputs of the main graph."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from onnxlr.model.checks import ONNX_DOMAINS


def lift(graph: onnx.GraphProto, name: str, dtype: int) -> str | None:
    """Have the nodes around a value of a body give it as one more output each.

    What a Loop or a Scan gives has an axis of its iterations in front. Of an If whose other branch
    runs it has no elements.

    Parameters
    ----------
    graph : onnx.GraphProto
        The main graph, which is changed.
    name : str
        Of the value.
    dtype : int
        Its type, as ONNX counts them.

    Returns
    -------
    str or None
        What the value is called in the main graph. None where no body has it, or several have one
        of this name, or what they belong to is none of the three: then the graph is as it was.
    """
    if sum(name in _names(body) for body in _bodies_within(graph)) != 1:
        return None
    return _lifted(graph, name, dtype, 0)


def _lifted(graph: onnx.GraphProto, name: str, dtype: int, depth: int) -> str | None:
    """The name by which a graph has a value that is in it, or in a body in it."""
    if name in _names(graph):
        return name
    for node in graph.node:
        for body in bodies(node):
            if node.op_type not in ("If", "Loop", "Scan") or node.domain not in ONNX_DOMAINS:
                continue
            inner = _lifted(body, name, dtype, depth + 1)
            if inner is None:
                continue
            outer = f"{name}/lifted_{depth}"
            # A body may give out what it is given only by way of a node.
            body.node.append(onnx.helper.make_node("Identity", [inner], [f"{outer}/given"]))
            _give(body, f"{outer}/given", dtype)
            if node.op_type == "If":
                _give_nothing(node, body, f"{outer}/nothing", dtype)
            for attribute in node.attribute:  # of a Scan: as for its other outputs, or 0 for all
                if attribute.name in ("scan_output_axes", "scan_output_directions"):
                    attribute.ints.append(0)
            node.output.append(outer)
            return outer
    return None


def _give(body: onnx.GraphProto, name: str, dtype: int) -> None:
    body.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))


def _give_nothing(node: onnx.NodeProto, body: onnx.GraphProto, name: str, dtype: int) -> None:
    """An array without elements, for the branch that doesn't have the value."""
    empty = numpy_helper.from_array(
        np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(dtype)), name=name
    )
    for other in bodies(node):
        if other is not body:
            other.node.append(onnx.helper.make_node("Constant", [], [name], value=empty))
            _give(other, name, dtype)


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that a node has as attributes."""
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def _bodies_within(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """All bodies of a graph, at any depth."""
    for node in graph.node:
        for body in bodies(node):
            yield body
            yield from _bodies_within(body)


def _names(graph: onnx.GraphProto) -> set[str]:
    """What nodes of a graph give, and what it is given."""
    return {name for node in graph.node for name in node.output} | {v.name for v in graph.input}
