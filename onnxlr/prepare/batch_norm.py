"""Folding inference BatchNormalization into the Conv before it."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.model.attributes import float_attr, int_attr
from onnxlr.model.constants import constant, to_float64
from onnxlr.model.graph import (
    DEFAULT_VALUES_IR,
    Names,
    add_initializer,
    all_graphs,
    copy_metadata,
    is_standard,
    opset,
    remove_unused,
)


class Refusal(Enum):
    """Why a BatchNormalization stays as it is."""

    NO_CONV = "its input is not the output of a Conv beside it"
    GRAPH_OUTPUT = "the output of the Conv is also an output of the graph"
    OTHER_READER = "the output of the Conv has another reader"
    INPUT_COUNT = "it doesn't have five inputs"
    OUTPUT_COUNT = "it has further outputs, as in training"
    TRAINING = "it is in training mode"
    NOT_SPATIAL = "it has a mean for each position, not for each channel"
    OVERRIDABLE = "a caller may feed another value for a weight or a parameter"
    WEIGHT_COMPUTED = "the weight of the Conv is not a constant"
    WEIGHT_SHARED = "the weight of the Conv has another reader"
    WEIGHT_OUTPUT = "the weight of the Conv is also an output of the graph"
    PARAMETER_COMPUTED = "a parameter of the BatchNormalization is not a constant"
    BIAS_COMPUTED = "the bias of the Conv is not a constant"
    SHAPES = "a parameter or the bias doesn't have one value for each output channel"
    VARIANCE = "a variance is not positive"
    OVERFLOW = "the product of weight and scale is beyond the weight's type"


@dataclass(frozen=True)
class Folding:
    """What ``fold_batch_norms`` did.

    Attributes
    ----------
    count : int
        How many BatchNormalizations are folded.
    refusals : dict of onnx_ir.Node to Refusal
        Every BatchNormalization that stays, and why.
    """

    count: int
    refusals: dict[ir.Node, Refusal]


@dataclass(frozen=True, eq=False)
class _Operands:
    """The constants of a Conv and of the BatchNormalization behind it."""

    kernel: ir.TensorProtocol
    bias: ir.TensorProtocol | None
    parameters: tuple[ir.TensorProtocol, ...]  # scale, shift, mean, variance

    def merge(self, epsilon: float) -> tuple[NDArray[Any], NDArray[Any]] | Refusal:
        """The kernel and the bias of the Conv that does both, in the kernel's type."""
        scale, shift, mean, variance = (to_float64(tensor) for tensor in self.parameters)
        spread = variance + epsilon
        if not (spread > 0).all():
            return Refusal.VARIANCE
        factor = scale / np.sqrt(spread)
        bias = to_float64(self.bias) if self.bias is not None else np.zeros_like(mean)
        kernel = to_float64(self.kernel)
        dtype = self.kernel.dtype.numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # what doesn't fit its type is refused
            new_kernel = (kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))).astype(dtype)
            new_bias = ((bias - mean) * factor + shift).astype(dtype)
        if not (np.isfinite(new_kernel).all() and np.isfinite(new_bias).all()):
            return Refusal.OVERFLOW
        return new_kernel, new_bias


def fold_batch_norms(model: ir.Model) -> Folding:
    """Fold every inference BatchNormalization into the Conv before it, in place.

    It takes a Conv whose output goes nowhere else, parameters that are constants, and a weight that
    belongs to this Conv alone. It comes before factorizing because the scale decides which output
    channels matter.
    """
    names, version = Names(model), opset(model)
    overridable = model.ir_version >= DEFAULT_VALUES_IR
    count, refusals = 0, {}
    for graph in all_graphs(model):
        for node in list(graph):
            if is_standard(node, "BatchNormalization"):
                refusal = _fold_batch_norm(graph, node, names, version, overridable)
                if refusal is None:
                    count += 1
                else:
                    refusals[node] = refusal
    return Folding(count, refusals)


def _fold_batch_norm(
    graph: ir.Graph, norm: ir.Node, names: Names, version: int, overridable: bool
) -> Refusal | None:
    """Replace a BatchNormalization and the Conv before it by one Conv, or return why not."""
    conv = _conv_before(graph, norm, version)
    if isinstance(conv, Refusal):
        return conv
    operands = _operands(conv, norm, overridable)
    if isinstance(operands, Refusal):
        return operands
    arrays = operands.merge(float_attr(norm, "epsilon", 1e-5))
    if isinstance(arrays, Refusal):
        return arrays
    weight, dtype = conv.inputs[1], operands.kernel.dtype
    stem = (weight.name if weight is not None else None) or conv.name or "conv"
    labels = f"{stem}/batch_norm_folded", f"{stem}/batch_norm_folded_bias"
    weights = [
        add_initializer(graph, names.unused(label), array, dtype)
        for label, array in zip(labels, arrays, strict=True)
    ]
    replacement = ir.Node(
        "", "Conv", [conv.inputs[0], *weights], conv.attributes.values(), name=conv.name
    )
    constants = [v for v in (*conv.inputs[1:], *norm.inputs[1:]) if v is not None]
    copy_metadata(conv, replacement)
    copy_metadata(norm.outputs[0], replacement.outputs[0])
    ir.convenience.replace_nodes_and_values(
        graph, norm, [conv, norm], [replacement], [norm.outputs[0]], [replacement.outputs[0]]
    )
    remove_unused(constants)
    return None


def _conv_before(graph: ir.Graph, norm: ir.Node, version: int) -> ir.Node | Refusal:
    """The Conv that feeds an inference BatchNormalization and nothing else."""
    value = norm.inputs[0]
    conv = value.producer() if value is not None else None
    if value is None or conv is None or not is_standard(conv, "Conv") or conv.graph is not graph:
        return Refusal.NO_CONV
    if value.is_graph_output():
        return Refusal.GRAPH_OUTPUT
    if len(value.uses()) != 1:
        return Refusal.OTHER_READER
    if len(norm.inputs) != 5:
        return Refusal.INPUT_COUNT
    # What says "training" is an attribute from opset 14 on, before that the number of outputs.
    if len(norm.outputs) > 1:
        return Refusal.OUTPUT_COUNT
    if int_attr(norm, "training_mode", 0):
        return Refusal.TRAINING
    if version < 9 and not int_attr(norm, "spatial", 1):
        return Refusal.NOT_SPATIAL
    return conv


def _operands(conv: ir.Node, norm: ir.Node, overridable: bool) -> _Operands | Refusal:
    """The constants of both nodes, where all of them are constants that fit and nothing shares."""
    weight = conv.inputs[1]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if overridable and any(
        v is not None and v.is_graph_input() for v in (*conv.inputs[1:], *norm.inputs[1:])
    ):
        return Refusal.OVERRIDABLE
    kernel, bias_tensor = constant(weight), constant(bias)
    if weight is None or kernel is None:
        return Refusal.WEIGHT_COMPUTED
    if len(weight.uses()) != 1:
        return Refusal.WEIGHT_SHARED
    if weight.is_graph_output():
        return Refusal.WEIGHT_OUTPUT
    parameters = [constant(value) for value in norm.inputs[1:]]
    if None in parameters:
        return Refusal.PARAMETER_COMPUTED
    if bias is not None and bias_tensor is None:
        return Refusal.BIAS_COMPUTED
    tensors = tuple(tensor for tensor in parameters if tensor is not None)
    channels = tuple(int(d) for d in tuple(kernel.shape)[:1])  # type: ignore[arg-type]
    vectors = tensors if bias_tensor is None else (*tensors, bias_tensor)
    if any(tuple(tensor.shape) != channels or 0 in channels for tensor in vectors):
        return Refusal.SHAPES
    return _Operands(kernel, bias_tensor, tensors)
