"""Finding the widths of a model: who writes, carries and reads the channels of each axis."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.layer import Layer
from onnxlr.model.graph import is_standard
from onnxlr.types import Shapes
from onnxlr.widths import elementwise, layout, reshaping
from onnxlr.widths.strands import (
    Channels,
    ConstantCut,
    Cut,
    SizeCut,
    Strand,
    Tracker,
    WeightCut,
    called,
)
from onnxlr.widths.weights import Weights

_Rule = Callable[[Tracker, ir.Node], None]

RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(elementwise.UNARY, elementwise.unary),
    **dict.fromkeys(elementwise.COMBINING, elementwise.combine),
    **dict.fromkeys(elementwise.POOLING, elementwise.pool),
    "BatchNormalization": elementwise.normalise,
    "InstanceNormalization": elementwise.normalise,
    "Transpose": layout.transpose,
    "Concat": layout.concat,
    "Split": layout.split,
    "Slice": layout.slice_,
    **dict.fromkeys(layout.REDUCTIONS, layout.reduce),
    "Squeeze": layout.squeeze,
    "Unsqueeze": layout.squeeze,
    "Reshape": reshaping.reshape,
    "Flatten": reshaping.reshape,
    "DepthToSpace": reshaping.depth_to_space,
    "SpaceToDepth": reshaping.depth_to_space,
    "Resize": layout.resize,
    "Upsample": layout.resize,
    "Pad": layout.pad,
    "Softmax": layout.along_axis,
    "LogSoftmax": layout.along_axis,
    "LayerNormalization": layout.along_axis,
    "Shape": layout.shape_of_it,
    "MatMul": layout.multiply,
}

# The others work on their first input, or along one axis.
_ANY_INPUT = (elementwise.combine, layout.concat, layout.multiply)
_IN_HEADS = (
    *(elementwise.unary, elementwise.combine),
    *(layout.transpose, reshaping.reshape, layout.multiply, layout.shape_of_it),
)


@dataclass(frozen=True, eq=False)
class Width:
    """Channels that the same nodes write, carry and read.

    Attributes
    ----------
    name : str
        Of the first layer that writes it, with a number if that writes several.
    size : int
        How many channels it has: those that stay or go together count as one.
    writers, readers : tuple of str
        Names of layers, in graph order.
    carriers : tuple of str
        Grouped convolutions by the names of their layers, and nodes with a number for each channel.
    refusal : str or None
        Why it has to stay as it is.
    heads : int
        Parts of as many channels each, one behind the other, which lose equally many.
    """

    name: str
    size: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    carriers: tuple[str, ...]
    refusal: str | None = None
    heads: int = 1

    def alike_in_heads(self, kept: Sequence[int]) -> bool:
        """Whether so many channels stay of each head as of the others."""
        counts = np.bincount(np.array(kept) * self.heads // self.size, minlength=self.heads)
        return bool((counts == counts[0]).all())


@dataclass(frozen=True, eq=False)
class Widths:
    """All widths of a model, with where their channels are.

    Attributes
    ----------
    rows : tuple of Width
        In graph order, those that are refused too.
    cuts : tuple of Cut
        All that is cut where channels go.
    strands : mapping of onnx_ir.Value to Strand
        The channels of the graph's values.
    """

    rows: tuple[Width, ...]
    cuts: tuple[Cut, ...]
    strands: Mapping[ir.Value, Strand]
    _owner: NDArray[np.int64]  # of each channel: the number of its width, -1 where it has none
    _place: NDArray[np.int64]  # of each channel: its number in that width

    @property
    def usable(self) -> tuple[Width, ...]:
        """Those that may be narrowed."""
        return tuple(w for w in self.rows if w.refusal is None)

    def without(self, reasons: Mapping[str, str]) -> "Widths":
        """The same, with all that some layers write, carry or read refused, by their names."""
        rows = []
        for row in self.rows:
            names = (*row.writers, *row.readers, *row.carriers)
            why = next((reasons[name] for name in names if name in reasons), None)
            rows.append(row if row.refusal or why is None else replace(row, refusal=why))
        return replace(self, rows=tuple(rows))

    def owners(self, channels: Channels) -> NDArray[np.int64]:
        """For each channel the number of its width in ``rows``; -1 where it has none."""
        return self._owner[channels]

    def places(self, channels: Channels) -> NDArray[np.int64]:
        """For each channel its number in its width."""
        return self._place[channels]

    def mask(self, kept: Mapping[str, Sequence[int]]) -> NDArray[np.bool_]:
        """Of all channels those that stay, where of each named width these do, of others all."""
        mask = np.ones(len(self._owner), dtype=bool)
        for i, row in enumerate(self.rows):
            if row.name in kept:
                inside = np.zeros(row.size, dtype=bool)
                inside[list(kept[row.name])] = True
                mine = self._owner == i
                mask[mine] = inside[self._place[mine]]
        return mask

    def weight_cuts(self, side: str) -> Iterator[WeightCut]:
        """The weights that are cut on one side."""
        return (c for c in self.cuts if isinstance(c, WeightCut) and c.side == side)


def no_widths() -> Widths:
    """None at all."""
    nobody = np.zeros(0, dtype=np.int64)
    return Widths((), (), {}, nobody, nobody)


def find_widths(model: ir.Model, layers: tuple[Layer, ...], shapes: Shapes) -> Widths:
    """Every width of a model's main graph; those that have to stay have their reason.

    Parameters
    ----------
    model : onnx_ir.Model
        With its functions inlined.
    layers : tuple of Layer
        Its layers.
    shapes : mapping of str to tuple of int
        Static shapes of the main graph's tensors.
    """
    tracker, weights = Tracker(model.graph, shapes), Weights(layers)
    for node in model.graph:
        _visit(tracker, weights, node)
    outputs = [tracker.strand(value) for value in model.graph.outputs]
    tracker.refuse(outputs, "an output of the model")
    return _grouped(tracker)


def _visit(tracker: Tracker, weights: Weights, node: ir.Node) -> None:
    """Follow channels through a node; whoever isn't known keeps them all."""
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            _refuse_captured(tracker, node, attribute)
    if weights.visit(tracker, node):
        return
    strands = [tracker.strand(v) for v in node.inputs]
    if not any(strands):
        return
    rule = RULES.get(node.op_type) if is_standard(node, node.op_type) else None
    in_heads = any(s is not None and s.heads is not None for s in strands)
    if (
        rule is None
        or (strands[0] is None and rule not in _ANY_INPUT)
        or (in_heads and rule not in _IN_HEADS)
    ):
        tracker.refuse(strands, f"read by {called(node)}, which may mix it")
    else:
        rule(tracker, node)


def _refuse_captured(tracker: Tracker, node: ir.Node, attribute: ir.Attr) -> None:
    """Keep what the bodies of a node read from outside."""
    graph = attribute.type == ir.AttributeType.GRAPH
    for body in [attribute.as_graph()] if graph else attribute.as_graphs():
        read = [v for inner in body.all_nodes() for v in inner.inputs]
        strands = [tracker.strand(v) for v in (*read, *body.outputs)]
        tracker.refuse(strands, f"read in a body of {called(node)}")


def _channels_of(cut: Cut) -> tuple[Channels, ...]:
    return cut.channels if isinstance(cut, SizeCut) else (cut.channels,)


def _grouped(tracker: Tracker) -> Widths:
    """Channels sorted into widths: those of one width appear in the same places equally often."""
    labels = tracker.components()
    count = int(labels.max(initial=-1)) + 1
    # A random number for each place; sums tell the sets of places apart.
    signature = np.zeros(count, dtype=np.uint64)
    parts = [channels for cut in tracker.cuts for channels in _channels_of(cut)]
    numbers = np.random.default_rng(0).integers(1, 2**63, len(parts), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number, channels in zip(numbers, parts, strict=True):
            np.add.at(signature, labels[channels.ravel()], number)
    reasons: dict[int, str] = {}
    for channels, why in tracker.refusals:
        for label in np.unique(labels[channels.ravel()]).tolist():
            reasons.setdefault(label, why)
    written = np.zeros(count, dtype=bool)
    for cut in tracker.cuts:
        if isinstance(cut, WeightCut) and cut.side == "out":
            written[labels[cut.channels]] = True
    groups: dict[tuple[int, str | None], list[int]] = {}
    for label in dict.fromkeys(labels.tolist()):  # in the order of their first channels
        if written[label]:
            key = int(signature[label]), reasons.get(label)
            groups.setdefault(key, []).append(label)
    owner, place = np.full(count, -1), np.zeros(count, dtype=np.int64)
    for i, members in enumerate(groups.values()):
        owner[members] = i
        place[members] = np.arange(len(members))
    owners, places = owner[labels], place[labels]
    heads, uneven = _heads(tracker, owners, places, [len(m) for m in groups.values()])
    named = _named(tracker, groups, owners, places)
    rows = (
        replace(row, refusal=row.refusal or uneven.get(i), heads=heads.get(i, 1))
        for i, row in enumerate(named.rows)
    )
    return replace(named, rows=tuple(rows))


def _heads(
    tracker: Tracker,
    owners: NDArray[np.int64],
    places: NDArray[np.int64],
    sizes: Sequence[int],
) -> tuple[dict[int, int], dict[int, str]]:
    """The number of heads of widths that have some, and why others can't be narrowed by heads."""
    heads: dict[int, int] = {}
    reasons: dict[int, str] = {}
    for grid in tracker.heads:
        if (places[grid] == places[grid[0]]).all() and (owners[grid] == owners[grid[0]]).all():
            continue  # they go together anyway
        here = [i for i in np.unique(owners[grid]).tolist() if i >= 0]
        whole = len(here) == 1 and sizes[here[0]] == grid.size
        in_order = whole and np.array_equal(places[grid].ravel(), np.arange(grid.size))
        for i in here:
            if not in_order or heads.setdefault(i, len(grid)) != len(grid):
                reasons[i] = f"cut into {len(grid)} heads that are tied to other channels"
            elif grid.shape[1] < 2:
                reasons[i] = "a single channel in each head"
    return heads, reasons


def _named(
    tracker: Tracker,
    groups: Mapping[tuple[int, str | None], list[int]],
    owner: NDArray[np.int64],
    place: NDArray[np.int64],
) -> Widths:
    roles: list[dict[str, list[str]]] = [
        {"out": [], "in": [], "through": []} for _ in range(len(groups))
    ]
    for cut in tracker.cuts:
        if isinstance(cut, SizeCut):
            continue
        side = cut.side if isinstance(cut, WeightCut) else "through"
        if isinstance(cut, ConstantCut) and cut.node.op_type in ("Conv", "Gemm", "ConvTranspose"):
            continue
        name = cut.layer.name if isinstance(cut, WeightCut) else called(cut.node)
        for i in np.unique(owner[cut.channels]).tolist():
            if i >= 0 and name not in roles[i][side]:
                roles[i][side].append(name)
    rows: list[Width] = []
    names: set[str] = set()
    for (_, refusal), members, role in zip(groups, groups.values(), roles, strict=True):
        stem = role["out"][0]
        name, i = stem, 1
        while name in names:
            name, i = f"{stem}_{i}", i + 1
        names.add(name)
        why = refusal or (None if role["in"] else "no weight reads it")
        if why is None and len(members) < 2:
            why = "a single channel"
        parts = tuple(role["out"]), tuple(role["in"]), tuple(role["through"])
        rows.append(Width(name, len(members), *parts, why))
    return Widths(tuple(rows), tuple(tracker.cuts), tracker.strands, owner, place)
