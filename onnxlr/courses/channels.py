"""How many channels each width keeps: by a named rank, or the cheapest within a predicted loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxlr.decompose import RankRule
from onnxlr.decompose.interpolative import Elimination
from onnxlr.decompose.ranks import round_up
from onnxlr.layers.layer import Layer
from onnxlr.methods.cost import layer_work
from onnxlr.plan.sensitivity import Sensitivity
from onnxlr.widths.find import Width, Widths
from onnxlr.widths.narrow import Kept

EXACT = 1e-6  # relative error of what is read, below which it is rounding
_NOISE = 1e-4  # the same where moments were summed in single precision
_STEPS = 16  # parts of a width, whose multiples may stay
_AHEAD = 4  # further numbers of channels that are looked at beside the next smaller one

Counts = dict[str, int]  # channels that stay, by the names of widths


@dataclass(frozen=True, eq=False)
class WidthOffer:
    """A width that may be narrowed, with what each number of channels loses.

    Attributes
    ----------
    width : Width
    elimination : Elimination
    sensitivity : Sensitivity
        What errors of what is read do to the model.
    """

    width: Width
    elimination: Elimination
    sensitivity: Sensitivity = field(default_factory=Sensitivity)

    def error(self, count: int) -> float:
        """Predicted relative error of what is read where so many channels stay."""
        return float(self.elimination.errors[self.width.size - count])

    def loss(self, count: int) -> float:
        """The same for the whole model; losses of widths add up."""
        return 0.0 if count == self.width.size else self.sensitivity.loss(self.error(count))

    def redundant(self, error: float = EXACT) -> int:
        """How many channels change nothing beyond an error when they go."""
        heads = self.width.heads
        return (int(np.count_nonzero(self.elimination.errors <= error)) - 1) // heads * heads

    def counts(self, *, gridded: bool) -> list[int]:
        """Numbers of channels that may stay, falling."""
        heads = self.width.heads
        size = self.width.size // heads
        exact = size - self.redundant(_NOISE) // heads
        wanted = {max(1, round(size * i / _STEPS)) for i in range(1, _STEPS)} | {exact}
        if gridded:
            wanted = {round_up(count, size) for count in wanted}
        return sorted((count * heads for count in wanted if count < size), reverse=True)

    def _whole(self, count: int) -> int:
        """As many channels, or so many more that all heads have equally many."""
        return -(-count // self.width.heads) * self.width.heads

    def named(self, rule: RankRule) -> int | str:
        """How many channels a rule other than ``auto`` keeps, or why it says nothing."""
        size, errors = self.width.size, self.elimination.errors
        if rule.kind == "exact":
            return size - self.redundant()
        if rule.kind == "energy":
            return self._whole(
                size - int(np.count_nonzero(np.square(errors) <= 1 - rule.value)) + 1
            )
        if rule.kind == "evbmf":
            return "interpolative: evbmf is for singular values, of which a width has none"
        return self._whole(rule.of_full(size))


def named_counts(offers: Sequence[WidthOffer], rule: RankRule) -> tuple[Counts, dict[str, str]]:
    """What a rule keeps of each width, and why others stay."""
    counts: Counts = {}
    reasons: dict[str, str] = {}
    for offer in offers:
        found, size = offer.named(rule), offer.width.size
        if isinstance(found, str):
            reasons[offer.width.name] = found
        elif found < size:
            counts[offer.width.name] = found
        elif rule.kind == "exact":
            reasons[offer.width.name] = "no channel is a combination of the others"
        else:
            reasons[offer.width.name] = f"{rule} keeps all {size} channels"
    return counts, reasons


def kept_of(offers: Sequence[WidthOffer], counts: Mapping[str, int]) -> Kept:
    """The channels that stay where so many do."""
    return {
        offer.width.name: tuple(offer.elimination.kept(counts[offer.width.name]).tolist())
        for offer in offers
        if counts.get(offer.width.name, offer.width.size) < offer.width.size
    }


class Costs:
    """What layers cost where their widths keep so many channels.

    A layer's cost is in proportion to the inputs that it has left and to the outputs.

    Parameters
    ----------
    layers : sequence of Layer
    widths : Widths
    goal : str
        ``latency``, ``macs``, ``params`` or ``bytes``.
    """

    def __init__(self, layers: Sequence[Layer], widths: Widths, goal: str) -> None:
        self._costs = {layer.name: _cost(layer, goal) for layer in layers}
        self._shares: dict[str, list[dict[str, float]]] = {name: [] for name in self._costs}
        for side in ("in", "out", "through"):
            for cut in widths.weight_cuts(side):
                numbers, counts = np.unique(widths.owners(cut.channels), return_counts=True)
                total = float(counts.sum())
                share = {
                    widths.rows[i].name: count / total
                    for i, count in zip(numbers.tolist(), counts.tolist(), strict=True)
                    if i >= 0
                }
                self._shares[cut.layer.name].append(share)
        self._sizes = {row.name: row.size for row in widths.rows}
        self._layers: dict[str, list[str]] = {row.name: [] for row in widths.rows}
        for name, shares in self._shares.items():
            for width in {w for share in shares for w in share}:
                self._layers[width].append(name)

    @property
    def total(self) -> float:
        """What all layers cost as they are."""
        return sum(self._costs.values())

    def cost(self, counts: Mapping[str, int]) -> float:
        """What all layers cost."""
        return sum(self._layer(name, counts) for name in self._costs)

    def saved(self, counts: Mapping[str, int], name: str, count: int) -> float:
        """What a width saves by keeping so many channels, beside the others as they are."""
        fewer = {**counts, name: count}
        layers = self._layers[name]
        return sum(self._layer(n, counts) - self._layer(n, fewer) for n in layers)

    def _layer(self, name: str, counts: Mapping[str, int]) -> float:
        cost = self._costs[name]
        for share in self._shares[name]:
            gone = sum(
                part * (1 - counts[width] / self._sizes[width])
                for width, part in share.items()
                if width in counts
            )
            cost *= 1 - gone
        return cost


def _cost(layer: Layer, goal: str) -> float:
    """What a layer costs as it is."""
    if goal == "macs":
        return float(layer.macs or 0)
    work = layer_work(layer)
    if goal == "latency" and work is not None:
        return work.usual_ms
    return float(layer.params)


@dataclass(frozen=True, eq=False)
class Level:
    """A predicted loss, the channels that stay within it, and what the layers then cost."""

    loss: float
    counts: Mapping[str, int]
    cost: float


def path(offers: Sequence[WidthOffer], costs: Costs, *, gridded: bool) -> list[Level]:
    """Levels from mild to bold: at each step the width that saves most for what it loses.

    Parameters
    ----------
    offers : sequence of WidthOffer
    costs : Costs
    gridded : bool
        Whether numbers of channels are those that kernels like.
    """
    numbers = {o.width.name: o.counts(gridded=gridded) for o in offers}
    by_name = {o.width.name: o for o in offers}
    counts: Counts = {}
    loss = 0.0
    levels: list[Level] = []
    while True:
        best: tuple[float, str, int, float] | None = None
        for name, rows in numbers.items():
            before = by_name[name].loss(counts.get(name, by_name[name].width.size))
            for count in rows[: _AHEAD + 1]:
                more = max(by_name[name].loss(count) - before, 1e-12)
                worth = costs.saved(counts, name, count) / more
                if np.isfinite(more) and worth > 0 and (best is None or worth > best[0]):
                    best = worth, name, count, more
        if best is None:
            return levels
        _, name, count, more = best
        counts = {**counts, name: count}
        numbers[name] = [n for n in numbers[name] if n < count]
        loss += more
        levels.append(Level(loss, counts, costs.cost(counts)))


def thinned(levels: Sequence[Level], losses: Sequence[float]) -> list[Level]:
    """The boldest level within each of some losses, each once."""
    picked = [
        max((level for level in levels if level.loss <= loss), key=lambda v: v.loss, default=None)
        for loss in losses
    ]
    return list(dict.fromkeys(level for level in picked if level is not None))
