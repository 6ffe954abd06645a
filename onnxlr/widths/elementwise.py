"""Operators that do the same to every channel, or combine values channel by channel."""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxlr.layers.tracing import is_fixed, trace
from onnxlr.model.constants import constant
from onnxlr.types import Shape
from onnxlr.widths.strands import ConstantCut, Strand, Tracker, called

# Each element of the output comes from one element of the first input; others are numbers.
UNARY = (
    *("Abs", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp"),
    *("Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid"),
    *("Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
)
# Inputs are broadcast to one shape and combined element by element.
COMBINING = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max"),
    *("Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)
# Windows over the other axes: each channel for itself.
POOLING = (
    *("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"),
)


def unary(tracker: Tracker, node: ir.Node) -> None:
    """The channels of the first input are those of the output."""
    first, *rest = (tracker.strand(v) for v in node.inputs)
    tracker.refuse(rest, f"read by {called(node)} beside its data input")
    if first is not None:
        tracker.put(node.outputs[0], first)
        if (shape := tracker.shape(node.inputs[0])) is not None:
            tracker.note(node.outputs[0], shape)


def pool(tracker: Tracker, node: ir.Node) -> None:
    """Windows along the axes behind the channels."""
    strand = tracker.strand(node.inputs[0])
    if strand is None:
        return
    if strand.axis != 1 or len(node.outputs) > 1:  # places of maxima count channels too
        tracker.refuse([strand], f"mixed by {called(node)}")
    tracker.put(node.outputs[0], strand)


def combine(tracker: Tracker, node: ir.Node) -> None:
    """Channels that meet belong together; constants beside them are cut with them."""
    values = [v for v in node.inputs if v is not None]
    strands = [tracker.strand(v) for v in values]
    shapes = [tracker.shape(v) for v in values]
    if any(s is not None and s.heads is not None for s in strands):
        _scale(tracker, node, strands, shapes)
        return
    known = [len(s) for s in shapes if s is not None]
    if len(known) < len(values):
        tracker.refuse(strands, f"{called(node)} has inputs of unknown shape")
        return
    rank = max(known)
    try:
        tracker.note(node.outputs[0], np.broadcast_shapes(*(s for s in shapes if s is not None)))
    except ValueError:  # declared shapes may contradict each other
        tracker.refuse(strands, f"{called(node)} has inputs of shapes that don't fit")
        return
    offsets = [rank - n for n in known]
    placed = [(s.at(s.axis + offset), s) for s, offset in zip(strands, offsets, strict=True) if s]
    size = max(len(s.channels) for s, _ in placed)
    wide = [s for s, _ in placed if len(s.channels) == size]
    out = wide[0]
    tracker.put(node.outputs[0], out)
    for strand, _ in placed:
        if strand.axis != out.axis:
            tracker.refuse([strand, out], f"{called(node)} combines it with another axis")
        elif len(strand.channels) != size:
            tracker.refuse([strand], f"broadcast by {called(node)}")
        else:
            tracker.bind(out.channels, strand.channels)
    for slot, value in enumerate(node.inputs):
        if value is None or tracker.strand(value) is not None:
            continue
        shape = tracker.shape(value) or ()
        axis = out.axis - (rank - len(shape))
        if axis >= 0 and not (shape[axis] == 1 and size > 1):
            _beside(tracker, node, slot, axis, out)


def _scale(
    tracker: Tracker,
    node: ir.Node,
    strands: Sequence[Strand | None],
    shapes: Sequence[Shape | None],
) -> None:
    """Channels of heads beside single numbers, such as a scale."""
    alone = [s for s in strands if s is not None]
    sizes = [shape for s, shape in zip(strands, shapes, strict=True) if s is None]
    if len(alone) > 1 or any(shape is None or math.prod(shape) > 1 for shape in sizes):
        tracker.refuse(strands, f"{called(node)} combines heads with more than single numbers")
        return
    rank = max(len(shape) for shape in shapes if shape is not None)
    own = next(shape for s, shape in zip(strands, shapes, strict=True) if s is not None)
    if own is None or len(own) < rank:
        tracker.refuse(strands, f"{called(node)} has inputs of unclear shape")
        return
    tracker.put(node.outputs[0], alone[0])
    tracker.note(node.outputs[0], own)


def _beside(tracker: Tracker, node: ir.Node, slot: int, axis: int, out: Strand) -> None:
    """An operand beside channels that has none of its own."""
    value = node.inputs[slot]
    if constant(value) is None:
        tracker.refuse([out], f"{called(node)} combines it with what no weight writes")
    elif not is_fixed(trace(value)):
        name = "" if value is None else value.name
        tracker.refuse([out], f"a caller may feed {name!r}, an operand of {called(node)}")
    else:
        tracker.cuts.append(ConstantCut(node, slot, axis, out.channels))


def normalise(tracker: Tracker, node: ir.Node) -> None:
    """BatchNormalization or InstanceNormalization: each channel has its own numbers."""
    strand = tracker.strand(node.inputs[0])
    if strand is None:
        return
    tracker.put(node.outputs[0], strand)
    if strand.axis != 1 or len(node.outputs) > 1:
        tracker.refuse([strand], f"normalised across by {called(node)}")
        return
    for slot, value in enumerate(node.inputs[1:], 1):
        if constant(value) is None or not is_fixed(trace(value)):
            tracker.refuse([strand], f"the numbers of {called(node)} are no constants")
            return
        tracker.cuts.append(ConstantCut(node, slot, 0, strand.channels))
