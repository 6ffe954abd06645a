"""Constant tensors of a graph: initializers and Constant nodes, their values and their number."""

import contextlib

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.errors import ModelError, one_line
from onnxlr.model.graph import all_graphs, is_standard


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output; None for anything else."""
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or not is_standard(node, "Constant") or len(node.attributes) != 1:
        return None
    tensor = node.attributes.get("value")
    if tensor is not None and not tensor.is_ref():
        return tensor.as_tensor()  # onnx-ir's get_const_tensor would rename it after the output
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:  # sparse constants
        return None


def values_of(tensor: ir.TensorProtocol) -> NDArray[np.generic]:
    """A tensor's values; those in external data are read, and their file is closed again.

    Raises
    ------
    ModelError
        If external data can't be read.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy())
    try:
        return np.array(tensor.numpy())
    except (OSError, ValueError) as error:  # removed or cut short after the model was checked
        raise ModelError(f"can't read the weight {tensor.name!r}: {one_line(error)}") from None
    finally:
        with contextlib.suppress(BufferError):  # another array still refers to the file
            tensor.release()


def to_float64(tensor: ir.TensorProtocol) -> NDArray[np.float64]:
    """A tensor's values in double precision."""
    with np.errstate(invalid="ignore"):  # signaling NaN becomes quiet NaN
        return values_of(tensor).astype(np.float64)


def count_params(model: ir.Model) -> int:
    """Number of floating-point and quantized weight elements, each stored tensor counted once.

    Initializers and Constant nodes of every graph and function count; integers of more than
    8 bits (indices, shapes) don't.
    """
    total = 0
    for graph in all_graphs(model):
        total += sum(_weight_size(v.const_value) for v in graph.initializers.values())
    nodes = list(model.graph.all_nodes())
    nodes += [n for function in model.functions.values() for n in function.all_nodes()]
    for node in nodes:
        if is_standard(node, "Constant"):
            total += _weight_size(constant(node.outputs[0]))
    return total


def _weight_size(tensor: ir.TensorProtocol | None) -> int:
    if tensor is None:
        return 0
    kind = tensor.dtype
    counts = kind.is_floating_point() or (kind.is_integer() and kind.bitwidth <= 8)
    return int(tensor.size) if counts else 0
