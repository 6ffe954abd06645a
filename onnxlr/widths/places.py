"""Where a layer's bias is, and where its channels are among its columns."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import Statistics
from onnxlr.layers.kernel import kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.operators import RECURRENT
from onnxlr.layers.tracing import is_fixed, trace
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard

Mask = NDArray[np.bool_]


def bias_place(use: Use) -> tuple[ir.Node, int] | None:
    """The node and the input where a bias of a layer is, or may be; None where there is none."""
    node = use.node
    if node.op_type in RECURRENT:
        return None  # it lies among the biases of all gates, beside those of the state
    if node.op_type != "MatMul":
        fixed = len(node.inputs) < 3 or node.inputs[2] is None or is_fixed(trace(node.inputs[2]))
        return (node, 2) if fixed else None
    readers = list(node.outputs[0].uses())
    if len(readers) != 1 or node.outputs[0].is_graph_output() or use.y_shape is None:
        return None
    add, slot = readers[0]
    other = add.inputs[1 - slot] if is_standard(add, "Add") else None
    tensor = constant(other)
    if tensor is None or not is_fixed(trace(other)):
        return None
    sizes = [int(d) for d in tensor.shape]  # type: ignore[arg-type]
    rows = bool(sizes) and sizes[-1] == use.y_shape[-1] == int(tensor.size)
    return (add, 1 - slot) if rows and len(sizes) <= len(use.y_shape) else None


def column_mask(layer: Layer, stays: Mask) -> Mask:
    """Which columns of outputs × inputs stay, where so many input channels do."""
    return np.repeat(stays, kernel_of(layer).positions) if layer.convolves else stays


def looked_at(layer: Layer) -> bool:
    """Whether rows of a layer's inputs are those that its weight, outputs × inputs, multiplies."""
    plain = layer.kind == "matrix" and len(layer.shape) == 2
    known = plain or layer.kind in ("conv", "projection")
    return known and all(use.x_shape is not None for use in layer.uses)


def inputs_known(layer: Layer, statistics: Statistics | None) -> Statistics | None:
    """The moments of a layer's inputs, where they are whole and of such rows."""
    if statistics is None or not statistics.covariance.size or not looked_at(layer):
        return None
    return statistics
