"""Operators that take axes apart or merge them: Reshape, Flatten, DepthToSpace, SpaceToDepth."""

import math

import numpy as np
import onnx_ir as ir

from onnxlr.model.attributes import int_attr, str_attr
from onnxlr.types import Shape
from onnxlr.widths.strands import Channels, SizeCut, Strand, Tracker, called, sizes_of


def reshape(tracker: Tracker, node: ir.Node) -> None:
    """Axes merged into one list (Flatten too), left as they are, or a list cut into heads."""
    strand, shape = tracker.first_input(node)
    if strand is None:
        return
    target = tracker.shape(node.outputs[0])
    flatten = node.op_type == "Flatten"
    sizes = None if flatten or target is None else sizes_of(node.inputs[1], len(target))
    if target is None or (sizes is None and not flatten):
        tracker.refuse([strand], f"{called(node)} gives it a shape that is no constant")
        return
    rules = (_merged, _in_heads, _heads_beside)
    moved = next(filter(None, (rule(strand, shape, target) for rule in rules)), None)
    if moved is None:
        tracker.refuse([strand], f"{called(node)} takes it apart")
        return
    if sizes is not None:
        number, place = sizes[moved.axis]
        if number is None:
            tracker.refuse([strand], f"{called(node)} gives it a size that is no constant")
            return
        if number == 0 and moved.axis != strand.axis:
            tracker.refuse([strand], f"{called(node)} copies the size of another axis")
            return
        if number > 0:
            tracker.cuts.append(SizeCut(node, "reshape", (moved.channels,), place))
    if moved.heads is not None and strand.heads is None:
        tracker.heads.append(moved.channels)
    if moved.heads is None and strand.heads is not None and strand.heads > strand.axis:
        # They come in turn, so that the same channel of each head has to go.
        for row in strand.channels[1:]:
            tracker.bind(strand.channels[0], row)
    tracker.put(node.outputs[0], moved)


def depth_to_space(tracker: Tracker, node: ir.Node) -> None:
    """Blocks of positions made of channels, which go together; SpaceToDepth the other way round."""
    strand, _ = tracker.first_input(node)
    if strand is None:
        return
    block = int_attr(node, "blocksize", 0) ** 2
    if strand.axis != 1 or block < 1:
        tracker.refuse([strand], f"mixed by {called(node)}")
        return
    if node.op_type == "SpaceToDepth":
        tracker.put(node.outputs[0], Strand(1, np.tile(strand.channels, block)))
        return
    in_order = str_attr(node, "mode", "DCR") == "DCR"
    rows = strand.channels.reshape(block, -1) if in_order else strand.channels.reshape(-1, block).T
    for row in rows[1:]:
        tracker.bind(rows[0], row)
    tracker.put(node.outputs[0], Strand(1, rows[0]))


def _merged(strand: Strand, shape: Shape, target: Shape) -> Strand | None:
    """The channels along the one axis that an axis, or several beside it, become."""
    first = strand.axis if strand.heads is None else min(strand.axis, strand.heads)
    last = strand.axis if strand.heads is None else max(strand.axis, strand.heads)
    grid = strand.channels if strand.heads in (None, first) else strand.channels.T
    for axis in range(len(target)):
        before = math.prod(target[:axis])
        starts = [i for i in range(first + 1) if math.prod(shape[:i]) == before]
        for start in reversed(starts):
            for end in range(last + 1, len(shape) + 1):
                if math.prod(shape[start:end]) != target[axis]:
                    continue
                own = (strand.axis, strand.heads)
                sizes = [shape[i] if i in own else 1 for i in range(start, end)]
                whole: Channels = np.broadcast_to(grid.reshape(sizes), shape[start:end]).ravel()
                return Strand(axis, whole)
    return None


def _in_heads(strand: Strand, shape: Shape, target: Shape) -> Strand | None:
    """The channels of each head, where an axis becomes two: the heads, and what each has."""
    if strand.heads is not None:
        return None
    before, count = math.prod(shape[: strand.axis]), len(strand.channels)
    for axis in range(1, len(target)):
        heads, each = target[axis - 1 : axis + 1]
        if math.prod(target[: axis - 1]) == before and heads * each == count and heads > 1:
            return Strand(axis, strand.channels.reshape(heads, each), axis - 1)
    return None


def _heads_beside(strand: Strand, shape: Shape, target: Shape) -> Strand | None:
    """The same heads, where other axes become more or fewer."""
    if strand.heads is None:
        return None
    axes: list[int] = []
    for old in (strand.axis, strand.heads):
        before = math.prod(shape[:old])
        same = (i for i, n in enumerate(target) if n == shape[old])
        axes += [i for i in same if math.prod(target[:i]) == before][:1]
    return strand.at(*axes) if len(axes) == 2 else None
