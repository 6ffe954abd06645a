"""The interface through which a method writes its nodes, and helpers for common ones."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.layer import Use

_SLICE_INPUTS, ALLOWZERO = 10, 14  # opsets from which on operators have them
AttributeValue = int | float | str | tuple[int, ...]


class Writer(Protocol):
    """What a pass writes its nodes with: names and places are the engine's concern."""

    opset: int

    def op(
        self, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, AttributeValue]
    ) -> ir.Value:
        """Add a node and return its first output."""

    def constant(self, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        """Add a small constant that is no factor."""


# Writes nodes around stored factors, and returns the value of their output.
Write = Callable[[tuple[ir.Value, ...], Writer], ir.Value]


class Site(Protocol):
    """Where the replacement of a layer is written: a graph, a count of work, modules that train."""

    def replace_use(self, use: Use, write: Write) -> None:
        """Put a chain in the place of one user of the layer's weight."""

    def replace_input(self, use: Use, write: Write) -> None:
        """Give a user the written value as its input, and the last factor as its weight."""

    def replace_weight(self, write: Write) -> None:
        """Put nodes that give the weight in the place of the stored weight."""


def integers(writer: Writer, *numbers: int) -> ir.Value:
    """Write a small int64 constant: sizes, axes, bounds."""
    return writer.constant(np.array(numbers, dtype=np.int64), ir.DataType.INT64)


def reshaped(writer: Writer, x: ir.Value, *sizes: tuple[int, ...] | ir.Value) -> ir.Value:
    """Write a Reshape to fixed sizes and to sizes that are read off a tensor, one after the other.

    A size of zero that is read is meant (an empty batch), and no axis to copy: so from opset 14 on,
    before that it is the size of the same axis of ``x``.
    """
    parts = [d if isinstance(d, ir.Value) else integers(writer, *d) for d in sizes if d != ()]
    shape = parts[0] if len(parts) == 1 else writer.op("Concat", [*parts], {"axis": 0})
    read = any(isinstance(d, ir.Value) for d in sizes)
    meant = {"allowzero": 1} if read and writer.opset >= ALLOWZERO else {}
    return writer.op("Reshape", [x, shape], meant)


def sizes_of(writer: Writer, x: ir.Value, start: int | None, end: int | None) -> ir.Value:
    """Write a slice of a tensor's shape, taken when it runs: the number of axes stays open."""
    shape = writer.op("Shape", [x], {})
    if (start, end) == (None, None):
        return shape
    first, last = start or 0, np.iinfo(np.int64).max if end is None else end
    if writer.opset < _SLICE_INPUTS:
        return writer.op("Slice", [shape], {"starts": (first,), "ends": (last,)})
    bounds = [integers(writer, bound) for bound in (first, last)]
    return writer.op("Slice", [shape, *bounds], {})
