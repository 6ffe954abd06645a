"""Biases that make up for the mean of what factors lose, wherever an operator has its bias."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.operators import RECURRENT
from onnxlr.methods.writer import Writer
from onnxlr.model.attributes import float_attr
from onnxlr.model.constants import constant, to_float64
from onnxlr.model.graph import DEFAULT_VALUES_IR, is_standard
from onnxlr.types import Shape


def shifted(
    use: Use,
    shift: NDArray[np.float64],
    stack: Shape,
    output: ir.Value,
    writer: Writer,
) -> ir.Value:
    """What a MatMul gives, with what its mean lost; without, where W may meet a vector."""
    if use.slot == 0 and use.x_axes is None:
        return output
    column: Shape = (-1, 1) if use.slot == 0 and use.x_axes != 1 else (-1,)
    if stack:  # of matrices, each with outputs of its own
        column = (*stack, -1, 1) if use.slot == 0 else (*stack, 1, -1)
    return writer.op("Add", [output, writer.constant(shift.reshape(column), use.dtype)], {})


def bias_behind(use: Use, outputs: int, model: ir.Model) -> tuple[ir.Node, int] | None:
    """The Add of a constant vector behind a MatMul, and which of its inputs that is."""
    output = use.node.outputs[0]
    readers = output.uses()
    if use.slot == 0 or output.is_graph_output() or len(readers) != 1:
        return None
    ((node, at),) = readers
    other = 1 - at
    if not is_standard(node, "Add") or (tensor := _fixed(node.inputs[other], model)) is None:
        return None
    return (node, other) if tuple(tensor.shape) == (outputs,) else None


def shift_behind(
    bias: tuple[ir.Node, int],
    shift: NDArray[np.float64],
    writer: Writer,
    dtype: ir.DataType,
) -> list[ir.Value]:
    """Add a shift to the vector that is added behind, and give the former one: it may be unused."""
    node, at = bias
    old = node.inputs[at]
    tensor = constant(old)
    assert old is not None
    assert tensor is not None
    node.replace_input_with(at, writer.constant(to_float64(tensor) + shift, dtype))
    return [old]


def shift_inside(
    layer: Layer, use: Use, shift: NDArray[np.float64], writer: Writer, model: ir.Model
) -> list[ir.Value]:
    """Shift the bias inside a recurrent or an attention operator, and give the former one.

    Where that is no constant, nothing is shifted.
    """
    node, recurrent = use.node, use.node.op_type in RECURRENT
    at = 3 if recurrent else 2
    old = node.inputs[at] if len(node.inputs) > at else None
    tensor = _fixed(old, model)
    if old is not None and tensor is None:
        return []
    if recurrent:  # biases of the input's products, then those of the state's
        directions, gates, _ = layer.shape
        moved = np.zeros((directions, 2 * gates)) if tensor is None else to_float64(tensor)
        moved = moved + np.pad(shift.reshape(directions, gates), ((0, 0), (0, gates)))
    else:
        moved = shift if tensor is None else to_float64(tensor) + shift
    node.resize_inputs(max(len(node.inputs), at + 1))
    node.replace_input_with(at, writer.constant(moved, use.dtype))
    return [] if old is None else [old]


def fixed_bias(use: Use, model: ir.Model) -> ir.TensorProtocol | None:
    """The bias of a Conv or Gemm, where it is a constant in whose place no caller feeds another."""
    return _fixed(use.node.inputs[2] if len(use.node.inputs) > 2 else None, model)


def _fixed(value: ir.Value | None, model: ir.Model) -> ir.TensorProtocol | None:
    """A constant in whose place no caller feeds another; None for whatever else."""
    fed = value is not None and value.is_graph_input() and model.ir_version >= DEFAULT_VALUES_IR
    return None if fed else constant(value)


def shift_bias(
    use: Use, shift: NDArray[np.float64], writer: Writer, fixed: ir.TensorProtocol | None
) -> None:
    """Give a Conv or Gemm, about to be replaced, a bias that makes up for the shift."""
    node = use.node
    alpha, beta = 1.0, 1.0
    if node.op_type == "Gemm":
        alpha, beta = float_attr(node, "alpha", 1.0), float_attr(node, "beta", 1.0)
    shift = alpha * shift
    old = node.inputs[2] if len(node.inputs) > 2 else None
    column = node.op_type == "Gemm" and use.slot == 0  # its outputs are rows
    moved = (shift / (beta or 1.0)).reshape((-1, 1) if column else (-1,))
    if old is None or fixed is not None:
        if fixed is not None:
            moved = moved + to_float64(fixed)
        bias = writer.constant(moved, use.dtype)
    else:
        bias = writer.op("Add", [old, writer.constant(moved, use.dtype)], {})
    if beta == 0.0:
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        bias = writer.constant(shift.reshape(moved.shape), use.dtype)
    node.resize_inputs(3)
    node.replace_input_with(2, bias)
