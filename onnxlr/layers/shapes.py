"""The static shape of a value of the main graph."""

import onnx_ir as ir

from onnxlr.model.constants import constant
from onnxlr.types import Shape, Shapes


def shape_of(value: ir.Value | None, graph: ir.Graph, shapes: Shapes) -> Shape | None:
    """The static shape of a value; None if it has none.

    Parameters
    ----------
    value : onnx_ir.Value or None
    graph : onnx_ir.Graph
        The main graph. A body may have other values of the same names, whose shapes are unclear.
    shapes : mapping of str to tuple of int
        Static shapes of the main graph's values by their names.
    """
    tensor = constant(value)
    if tensor is not None:
        return tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    if value is None or value.graph is not graph:
        return None
    return shapes.get(value.name or "")
