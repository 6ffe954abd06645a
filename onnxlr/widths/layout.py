"""Operators that move channels: to another axis, into a longer list, or into parts of it."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxlr.model.attributes import int_attr, ints_attr
from onnxlr.model.constants import constant, to_float64
from onnxlr.widths.strands import (
    Place,
    SizeCut,
    Strand,
    Tracker,
    called,
    numbers,
)

REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
)


def transpose(tracker: Tracker, node: ir.Node) -> None:
    """Axes in another order."""
    strand, shape = tracker.first_input(node)
    if strand is not None:
        order = ints_attr(node, "perm", tuple(reversed(range(len(shape)))))
        heads = None if strand.heads is None else order.index(strand.heads)
        tracker.put(node.outputs[0], strand.at(order.index(strand.axis), heads))
        tracker.note(node.outputs[0], tuple(shape[i] for i in order))


def concat(tracker: Tracker, node: ir.Node) -> None:
    """Lists of channels one after the other; along another axis, channels that belong together."""
    strands = [tracker.strand(v) for v in node.inputs]
    shapes = [tracker.shape(v) for v in node.inputs]
    first = next(s for s in strands if s is not None)
    if any(shape is None for shape in shapes):
        tracker.refuse(strands, f"{called(node)} has inputs of unknown shape")
        return
    axis = int_attr(node, "axis", 1) % len(shapes[0] or ())
    if any(s is not None and s.axis != first.axis for s in strands):
        tracker.refuse(strands, f"{called(node)} joins different axes")
    elif axis == first.axis:
        why = f"joined by {called(node)}, and no weight writes it"
        parts = [
            tracker.foreign((shape or ())[axis], why) if s is None else s.channels
            for s, shape in zip(strands, shapes, strict=True)
        ]
        tracker.put(node.outputs[0], Strand(axis, np.concatenate(parts)))
    else:
        if any(s is None for s in strands):
            tracker.refuse(strands, f"{called(node)} joins it with what no weight writes")
        for s in strands:
            if s is not None:
                tracker.bind(first.channels, s.channels)
        tracker.put(node.outputs[0], first)


def split(tracker: Tracker, node: ir.Node) -> None:
    """Parts of a list of channels."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    if int_attr(node, "axis", 0) % len(shape) != strand.axis:
        for value in node.outputs:
            tracker.put(value, strand)
        return
    count, parts = len(strand.channels), len(node.outputs)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    sizes: Sequence[int] | None = ints_attr(node, "split", ()) if given is None else numbers(given)
    if given is None and not sizes:
        each = -(-count // parts)
        sizes = [min(each, count - i * each) for i in range(parts)]
    if sizes is None or sum(sizes) != count or min(sizes) < 1:
        tracker.refuse([strand], f"{called(node)} cuts it into parts of unknown size")
        return
    pieces = np.split(strand.channels, np.cumsum(sizes)[:-1])
    for value, piece in zip(node.outputs, pieces, strict=True):
        tracker.put(value, Strand(strand.axis, piece))
    tracker.cuts.append(SizeCut(node, "split", tuple(pieces)))


def slice_(tracker: Tracker, node: ir.Node) -> None:
    """A part of a list of channels; along other axes nothing changes."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    if len(node.inputs) == 1:
        tracker.refuse([strand], f"read by {called(node)} of an old operator set")
        return
    starts, ends = numbers(node.inputs[1]), numbers(node.inputs[2])
    axes = numbers(node.inputs[3]) if _given(node, 3) else list(range(len(starts or ())))
    steps = numbers(node.inputs[4]) if _given(node, 4) else [1] * len(starts or ())
    if axes is None or strand.axis in {a % len(shape) for a in axes}:
        if axes is None or starts is None or ends is None or steps is None:
            tracker.refuse([strand], f"the bounds of {called(node)} are no constants")
            return
        i = [a % len(shape) for a in axes].index(strand.axis)
        count = len(strand.channels)
        first, last, step = slice(starts[i], ends[i], steps[i]).indices(count)
        if step != 1 or last <= first:
            tracker.refuse([strand], f"{called(node)} takes channels in steps")
            return
        before, inside = strand.channels[:first], strand.channels[first:last]
        tracker.cuts.append(SizeCut(node, "slice", (before, inside), Place(None, i)))
        strand = Strand(strand.axis, inside)
    tracker.put(node.outputs[0], strand)


def reduce(tracker: Tracker, node: ir.Node) -> None:
    """Sums and means along other axes."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    axes: Sequence[int] | None = ints_attr(node, "axes", ())
    if _given(node, 1):
        axes = numbers(node.inputs[1])
    reduced = {a % len(shape) for a in axes or ()}
    if not reduced or strand.axis in reduced:
        tracker.refuse([strand], f"summed up by {called(node)}")
        return
    dropped = 0 if int_attr(node, "keepdims", 1) else sum(a < strand.axis for a in reduced)
    tracker.put(node.outputs[0], strand.at(strand.axis - dropped))


def squeeze(tracker: Tracker, node: ir.Node) -> None:
    """Axes of size 1 fewer, or more."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    axes: Sequence[int] | None = ints_attr(node, "axes", ())
    if _given(node, 1):
        axes = numbers(node.inputs[1])
    if not axes:
        tracker.refuse([strand], f"{called(node)} names no axes")
        return
    if node.op_type == "Squeeze":
        gone = {a % len(shape) for a in axes}
        if strand.axis in gone:
            tracker.refuse([strand], f"{called(node)} drops its axis")
            return
        tracker.put(node.outputs[0], strand.at(strand.axis - sum(a < strand.axis for a in gone)))
        return
    rank = len(shape) + len(axes)
    new = {a % rank for a in axes}
    old = [a for a in range(rank) if a not in new]
    tracker.put(node.outputs[0], strand.at(old[strand.axis]))


def multiply(tracker: Tracker, node: ir.Node) -> None:
    """A product of two computed values: the rows of the left and the columns of the right stay."""
    values = node.inputs[:2]
    strands, shapes = [tracker.strand(v) for v in values], [tracker.shape(v) for v in values]
    left, right = shapes
    if left is None or right is None or min(len(left), len(right)) < 2:
        tracker.refuse(strands, f"{called(node)} has inputs of unclear shape")
        return
    rank = max(len(left), len(right))
    if all(strands):
        tracker.refuse(strands, f"{called(node)} multiplies it with other channels")
        return
    for strand, shape, free in zip(strands, (left, right), (2, 1), strict=True):
        if strand is None:
            continue
        behind = len(shape) - strand.axis
        if behind != free or (strand.heads is not None and len(shape) - strand.heads <= 2):
            tracker.refuse([strand], f"summed up by {called(node)}")
            return
        heads = None if strand.heads is None else rank - len(shape) + strand.heads
        tracker.put(node.outputs[0], strand.at(rank - behind, heads))


def resize(tracker: Tracker, node: ir.Node) -> None:
    """Resize and Upsample along other axes."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    factors = _factors(node)
    if factors is None or len(factors) != len(shape) or factors[strand.axis] != 1.0:
        tracker.refuse([strand], f"{called(node)} may resize it")
        return
    tracker.put(node.outputs[0], strand)


def _factors(node: ir.Node) -> list[float] | None:
    """By how much each axis grows, as far as constants tell."""
    if node.op_type == "Upsample" and len(node.inputs) == 1:
        attr = node.attributes.get("scales")
        return None if attr is None or attr.is_ref() else [float(f) for f in attr.as_floats()]
    slot = 1 if node.op_type == "Upsample" or len(node.inputs) == 2 else 2
    value = node.inputs[slot] if len(node.inputs) > slot else None
    tensor = constant(value)
    if "axes" in node.attributes or tensor is None or not tensor.size:
        return None
    return [float(f) for f in to_float64(tensor).ravel()]


def pad(tracker: Tracker, node: ir.Node) -> None:
    """Pad along other axes."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    pads: Sequence[int] | None = ints_attr(node, "pads", ())
    if _given(node, 1):
        pads = numbers(node.inputs[1])
    rank, axis = len(shape), strand.axis
    if not pads or _given(node, 3) or len(pads) != 2 * rank or pads[axis] or pads[axis + rank]:
        tracker.refuse([strand], f"{called(node)} may pad it")
        return
    tracker.put(node.outputs[0], strand)


def along_axis(tracker: Tracker, node: ir.Node) -> None:
    """Softmax and LayerNormalization: what they do along another axis leaves channels apart."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    axis = int_attr(node, "axis", -1) % len(shape)
    if strand.axis >= axis:
        word = "normalised" if "Norm" in node.op_type else "mixed"
        tracker.refuse([strand], f"{word} across by {called(node)}")
        return
    tracker.put(node.outputs[0], strand)


def shape_of_it(tracker: Tracker, node: ir.Node) -> None:
    """Shape: whoever reads the number of channels there keeps it."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    axes = range(len(shape))[int_attr(node, "start", 0) : int_attr(node, "end", len(shape))]
    if strand.axis not in axes:
        return
    for reader, _ in node.outputs[0].uses():
        index = numbers(reader.inputs[1]) if reader.op_type == "Gather" else None
        if index is None or strand.axis in {axes[i % len(axes)] for i in index}:
            tracker.refuse([strand], f"{called(node)} reads how many there are")
            return


def _given(node: ir.Node, slot: int) -> bool:
    return len(node.inputs) > slot and node.inputs[slot] is not None
