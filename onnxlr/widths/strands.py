"""Channels followed through a graph: which of them belong together, and what is cut with them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.shapes import shape_of
from onnxlr.layers.tracing import is_fixed, trace
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard
from onnxlr.types import Shape, Shapes

Channels = NDArray[np.int64]  # numbers of channels, one for each place along an axis

# What is set to so many channels as stay: an attribute, or an entry of a list of sizes.
SizeOf = Literal["group", "split", "slice", "reshape"]


@dataclass(frozen=True, eq=False)
class Strand:
    """The channels along one axis of a value, or along two where attention has its heads.

    Attributes
    ----------
    axis : int
    channels : ndarray of int
        A row for each head where there are some, with the channels along ``axis``.
    heads : int or None
        The axis of the heads.
    """

    axis: int
    channels: Channels
    heads: int | None = None

    def at(self, axis: int, heads: int | None = None) -> "Strand":
        """The same channels along other axes."""
        return Strand(axis, self.channels, heads)


@dataclass(frozen=True, eq=False)
class WeightCut:
    """A layer's weight as writer or reader of channels; a carrier's are cut and nothing more.

    Attributes
    ----------
    layer : Layer
    use : Use
        The first of its users: the others have the same channels.
    side : str
        Of the weight as outputs × inputs: ``out`` or ``in``. A grouped convolution only passes on
        whole groups: ``through``.
    channels : ndarray of int
    """

    layer: Layer
    use: Use
    side: Literal["out", "in", "through"]
    channels: Channels


@dataclass(frozen=True, eq=False)
class ConstantCut:
    """A constant input of a node with an entry for each channel along an axis."""

    node: ir.Node
    slot: int
    axis: int
    channels: Channels


@dataclass(frozen=True, eq=False)
class Place:
    """Where a number of a list stands that a node is given.

    Attributes
    ----------
    slot : int or None
        The input of the Concat that puts the list together; None for a list that is a constant.
    index : int
        In that input, or in the list.
    """

    slot: int | None
    index: int


@dataclass(frozen=True, eq=False)
class SizeCut:
    """A number, or several, that count channels.

    Attributes
    ----------
    node : onnx_ir.Node
    what : str
    channels : tuple of ndarray of int
        For each number, the channels that it counts: of several rows those of each alike.
    place : Place or None
        Where the number stands, if in a list that is an input of the node.
    """

    node: ir.Node
    what: SizeOf
    channels: tuple[Channels, ...]
    place: Place | None = None


Cut = WeightCut | ConstantCut | SizeCut


@dataclass
class Tracker:
    """What is known of the channels of a graph's values while its nodes are visited in order.

    Parameters
    ----------
    graph : onnx_ir.Graph
        The main graph.
    shapes : mapping of str to tuple of int
    """

    graph: ir.Graph
    shapes: Shapes
    strands: dict[ir.Value, Strand] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    refusals: list[tuple[Channels, str]] = field(default_factory=list)
    heads: list[Channels] = field(default_factory=list)  # which lose equally many channels each
    count: int = 0
    _noted: dict[ir.Value, Shape] = field(default_factory=dict)
    _bonds: list[tuple[Channels, Channels]] = field(default_factory=list)

    def first_input(self, node: ir.Node) -> tuple[Strand | None, Shape]:
        """The channels of the first input, and its shape; others that have channels keep them."""
        strand, shape = self.strand(node.inputs[0]), self.shape(node.inputs[0])
        self.refuse(
            [self.strand(v) for v in node.inputs[1:]],
            f"read by {called(node)} beside its data input",
        )
        if strand is not None and shape is None:
            self.refuse([strand], f"{called(node)} has an input of unknown shape")
            return None, ()
        return strand, shape or ()

    def fresh(self, size: int) -> Channels:
        """New channels."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def strand(self, value: ir.Value | None) -> Strand | None:
        """The channels of a value, if it has any."""
        return None if value is None else self.strands.get(value)

    def put(self, value: ir.Value, strand: Strand | None) -> None:
        """Say which channels a value has."""
        if strand is not None:
            self.strands[value] = strand

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The static shape of a value; None where it is unclear."""
        found = shape_of(value, self.graph, self.shapes)
        return self._noted.get(value) if found is None and value is not None else found

    def note(self, value: ir.Value, shape: Shape) -> None:
        """Say which shape a value has that nobody has told of."""
        self._noted.setdefault(value, shape)

    def bind(self, a: Channels, b: Channels) -> None:
        """Have channels stay or go together, one by one."""
        if a is not b:
            self._bonds.append((a, b))

    def refuse(self, strands: Sequence[Strand | None], reason: str) -> None:
        """Have all channels of some strands stay."""
        self.refusals += [(s.channels, reason) for s in strands if s is not None]

    def foreign(self, size: int, reason: str) -> Channels:
        """Channels that no weight writes, which stay."""
        channels = self.fresh(size)
        self.refusals.append((channels, reason))
        return channels

    def components(self) -> NDArray[np.int64]:
        """For each channel the number of those that stay or go with it."""
        pairs = [np.stack([a.ravel(), b.ravel()]) for a, b in self._bonds]
        ends = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.int64)
        graph = coo_array((np.ones(ends.shape[1]), (ends[0], ends[1])), (self.count, self.count))
        return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def numbers(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant that nobody can feed; None for anything else."""
    if value is None or not is_fixed(trace(value)):
        return None
    tensor = constant(value)
    if tensor is None or not tensor.dtype.is_integer():
        return None
    return [int(v) for v in np.asarray(tensor.numpy()).ravel()]


def sizes_of(value: ir.Value | None, count: int) -> list[tuple[int | None, Place]] | None:
    """The entries of a list of so many sizes, each a number where it is a constant.

    The list is a constant itself, or a Concat puts it together. It is None where that is unclear.
    """
    if (fixed := numbers(value)) is not None:
        return [(number, Place(None, i)) for i, number in enumerate(fixed)]
    node = None if value is None else value.producer()
    if node is None or not is_standard(node, "Concat"):
        return None
    parts = [numbers(part) for part in node.inputs]
    if sum(1 if part is None else len(part) for part in parts) != count:
        return None  # one that is computed holds several
    return [
        (number, Place(slot, i))
        for slot, part in enumerate(parts)
        for i, number in enumerate([None] if part is None else part)
    ]


def called(node: ir.Node) -> str:
    """A node, in words."""
    return f"{node.op_type} {node.name or node.outputs[0].name or '(unnamed)'!r}"
