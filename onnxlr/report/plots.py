"""The report's figures: small SVG panels of spectra, and of error against cost."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from onnxlr.plan.plan import Alternative, Decision
from onnxlr.report.markup import escape
from onnxlr.report.report import LayerSpectrum
from onnxlr.report.svg import SERIES, STAND_IN, to_svg
from onnxlr.types import Rank, rank_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 300, 190  # of a panel, in units of its viewBox
_BOX = (52 / WIDTH, 40 / HEIGHT, 240 / WIDTH, 132 / HEIGHT)  # left, bottom, width, height
SMALLEST = 1e-6  # below this a share or an error is drawn as this

# Eleven beside seven colours: no pair returns before the 78th method.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_INK = STAND_IN["ink"]
MARKS: dict[str, dict[str, Any]] = {
    "chosen": {"marker": "o", "color": _INK, "markersize": 6},
    "evbmf": {"marker": "D", "color": _INK, "markersize": 7, "markerfacecolor": "none"},
    "ring": {
        "marker": "o",
        "color": _INK,
        "markersize": 12,
        "markerfacecolor": "none",
        "markeredgewidth": 1.6,
    },
}
_ORIGINAL: dict[str, Any] = {"color": STAND_IN["muted"], "linewidth": 1, "linestyle": "--"}
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every panel."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Point:
    """A candidate in a figure: its cost, in the unit of the figure, and its relative error."""

    method: str
    rank: Rank
    cost: float
    error: float
    chosen: bool


@dataclass(frozen=True)
class Tradeoff:
    """A layer's candidates in a figure.

    Attributes
    ----------
    unit : str
        What costs are counted in.
    original : float or None
        Cost of the original layer, if there is one.
    points : tuple of Point
    """

    unit: str
    original: float | None
    points: tuple[Point, ...]


def method_looks(decisions: Iterable[Decision]) -> dict[str, Look]:
    """A look for every method among the alternatives, in the order of their names."""
    names = sorted({other.method for d in decisions for other in d.alternatives})
    return {
        name: Look(f"series-{i % SERIES}", _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(names)
    }


def spectrum_plot(curves: Sequence[LayerSpectrum], label: str, key: str) -> str:
    """Singular values of a layer's unfoldings, with the chosen rank and that above the noise.

    Parameters
    ----------
    curves : sequence of LayerSpectrum
        The curves of one layer and method: one for each number of the rank.
    label : str
        What the figure shows, for readers who don't see it.
    key : str
        The prefix of every identifier within, unique on the page.
    """

    def draw(axes: "Axes") -> None:
        marks = [r for c in curves for r in (c.chosen, c.evbmf) if r is not None]
        longest = max([len(c.values) for c in curves] + marks)
        lowest = min(_floored(c.values[-1]) for c in curves)
        for i, curve in enumerate(curves):
            axes.plot(
                range(1, len(curve.values) + 1),
                [_floored(value) for value in curve.values],
                _DASHES[i % len(_DASHES)],
                color=STAND_IN["accent"],
                linewidth=1.5,
                marker="." if len(curve.values) < 12 else "",
            )
            _mark(axes, curve.evbmf, curve.values, "evbmf")
            if curve.chosen is not None:
                _mark(axes, curve.chosen, curve.values, "chosen")
        _name_ranks(axes, sorted({c.chosen for c in curves if c.chosen is not None}))
        axes.set_xlim(0, longest * 1.03 + 0.5)
        _log_axis(axes, lowest, 1.0)
        _whole_axis(axes)
        label_axes(axes, "index of the singular value", "share of the largest")

    return draw_panel(draw, label, key)


def tradeoff_plot(tradeoff: Tradeoff, looks: Mapping[str, Look], label: str, key: str) -> str:
    """The predicted error of every candidate against its cost; the chosen one has a ring.

    Parameters
    ----------
    tradeoff : Tradeoff
        The candidates: at least one point.
    looks : mapping of str to Look
        The looks from ``method_looks``.
    label, key : str
        As for ``spectrum_plot``.
    """
    points, original = tradeoff.points, tradeoff.original

    def draw(axes: "Axes") -> None:
        for method in dict.fromkeys(p.method for p in points):
            # From error to error: in the order of the costs, noise in times would make a zigzag.
            line = sorted((p.error, p.cost) for p in points if p.method == method)
            look = looks[method]
            axes.plot(
                [cost for _, cost in line],
                [error for error, _ in line],
                color=STAND_IN[look.colour],
                marker=look.marker,
                markersize=5,
                linewidth=0.8,
            )
        right = max([p.cost for p in points] + ([] if original is None else [original]))
        if original is not None:
            axes.axvline(original, **_ORIGINAL)
        for point in points:
            if point.chosen:
                _ring(axes, point, right)
        errors = [p.error for p in points]
        axes.set_xlim(0, right * 1.06)
        _log_axis(axes, min(errors) / 1.25, max(errors) * 1.25)
        amount_axis(axes)
        label_axes(axes, tradeoff.unit, "relative error")

    return draw_panel(draw, label, key)


def method_swatch(look: Look, key: str) -> str:
    """A method's marker on its line, for the legend."""

    def draw(axes: "Axes") -> None:
        colour = STAND_IN[look.colour]
        axes.plot([-0.9, 0.9], [0, 0], color=colour, linewidth=0.8)
        axes.plot([0], [0], color=colour, marker=look.marker, markersize=6)

    return _swatch(draw, key)


def mark_swatch(mark: Literal["chosen", "evbmf", "ring", "original"], key: str) -> str:
    """A mark that the figures use beside the methods, for the legend."""

    def draw(axes: "Axes") -> None:
        if mark == "original":
            axes.axvline(0, **_ORIGINAL)
        elif mark == "ring":
            axes.plot([0], [0], **MARKS["ring"] | {"markersize": 10})
        else:
            axes.plot([-0.9, 0.9], [0, 0], color=STAND_IN["accent"], linewidth=1.5)
            axes.plot([0], [0], **MARKS[mark])

    return _swatch(draw, key)


def _swatch(draw: Callable[["Axes"], None], key: str) -> str:
    def fill(figure: "Figure") -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        draw(axes)

    # The words beside it say all.
    return to_svg(fill, (28, 14), 'class="swatch" aria-hidden="true"', key)


def tradeoff_of(decision: Decision) -> Tradeoff:
    """The candidates of a layer that have an error and a cost, each finite.

    Costs are milliseconds if the chosen candidate was timed, or any where none is chosen; else MACs
    if every candidate and the layer have them, which a lookup doesn't; else parameters.
    """
    others = decision.alternatives
    chosen = [o for o in others if _is_chosen(decision, o)]
    costs: list[float | None]
    if any(o.after_ms is not None for o in chosen or others):
        unit, costs = "ms, the layer alone", [o.after_ms for o in others]
        timed = (decision.before_ms, *(o.before_ms for o in others))
        original = next((ms for ms in timed if ms is not None), None)
    elif decision.macs_before and all(o.macs is not None for o in others):
        unit, costs, original = "MACs", [o.macs for o in others], decision.macs_before
    else:
        unit, costs, original = "parameters", [o.params for o in others], decision.params_before
    points = [
        Point(o.method, o.rank, cost, max(o.error, SMALLEST), _is_chosen(decision, o))
        for o, cost in zip(others, costs, strict=True)
        if o.error is not None and math.isfinite(o.error)
        if cost is not None and math.isfinite(cost)
    ]
    return Tradeoff(unit, original, tuple(points))


def _is_chosen(decision: Decision, other: Alternative) -> bool:
    return (other.method, other.rank) == (decision.decision, decision.rank)


def _mark(axes: "Axes", rank: int, shares: Sequence[float], mark: str) -> None:
    at = _floored(shares[min(max(rank, 1), len(shares)) - 1])
    axes.plot([rank], [at], **MARKS[mark], zorder=4, clip_on=False)


def _name_ranks(axes: "Axes", ranks: Sequence[int]) -> None:
    """Draw a line up to each chosen rank with its number; two numbers never overlap."""
    for i, rank in enumerate(ranks):
        axes.axvline(rank, color=_INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            str(rank),
            (rank, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center" if len(ranks) == 1 else ("right", "left")[min(i, 1)],
            va="bottom",
        )


def _ring(axes: "Axes", point: Point, right: float) -> None:
    at = (point.cost, point.error)
    axes.plot([at[0]], [at[1]], **MARKS["ring"], zorder=4)
    leftwards = point.cost > right / 2
    axes.annotate(
        rank_text(point.rank),
        at,
        xytext=(-9 if leftwards else 9, 5),
        textcoords="offset points",
        ha="right" if leftwards else "left",
    )


def _floored(value: float) -> float:
    return value if value > SMALLEST else SMALLEST  # a NaN compares false


def _log_axis(axes: "Axes", low: float, high: float) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    low = min(low, high / 1.5)
    ticks = log_ticks(low, high)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.1, high * 1.1)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{t:g}" for t in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones: as many as have room beside each other.

    Examples
    --------
    >>> log_ticks(0.02, 1.0)
    [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    >>> log_ticks(1e-6, 1.0)
    [1e-06, 0.0001, 0.01, 1.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = math.ceil((last - first) / 5)
    room = math.log10(high / low) / 8
    finest = [i / 10 for i in (*range(10, 20), *range(20, 50, 2), *range(50, 100, 5))]
    steps = ((1,), (1, 2, 5), range(1, 10), finest)
    within: list[float] = []
    for step in steps:
        ticks = [float(f"{m}e{d}") for d in range(last, first - 1, -stride) for m in step]
        inside = sorted(t for t in ticks if low * 0.999 <= t <= high * 1.001)
        if any(math.log10(b / a) < room for a, b in pairwise(inside)):
            break
        within = inside
    return within


def _whole_axis(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def amount_axis(axes: "Axes") -> None:
    """Mark amounts along the horizontal axis."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    large = axes.get_xlim()[1] >= 1000
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if large else StrMethodFormatter("{x:g}"))


def label_axes(axes: "Axes", x: str, y: str) -> None:
    """Name the axes of a panel."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.yaxis.set_label_coords(-0.16, 0.5)  # in line from panel to panel, however wide the ticks


def draw_panel(draw: Callable[["Axes"], None], label: str, key: str) -> str:
    """A plot as an SVG element, with the axes that all panels share."""

    def fill(figure: "Figure") -> None:
        axes = figure.add_axes(_BOX)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)

    return to_svg(fill, (WIDTH, HEIGHT), f'role="img" aria-label="{escape(label)}"', key)
