"""The report's figures: small SVG panels of spectra, and of error against cost."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from onnxlr.graph_pass import Rank, rank_words
from onnxlr.markup import said
from onnxlr.plan import Decision
from onnxlr.report import LayerSpectrum
from onnxlr.svg import SERIES, STAND_IN, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 300, 190  # of a panel, in units of its viewBox
_BOX = (52 / WIDTH, 40 / HEIGHT, 240 / WIDTH, 132 / HEIGHT)  # left, bottom, width, height
_DECORATIVE = 'aria-hidden="true"'  # the words beside it say all
SMALLEST = 1e-6  # below this a share or an error is drawn as this

# Eleven beside seven colours: no pair returns before the 78th method.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every panel."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Point:
    """A candidate in a figure: its cost, in the figure's unit, and its relative error."""

    method: str
    rank: Rank
    cost: float
    error: float
    chosen: bool


@dataclass(frozen=True)
class Tradeoff:
    """A layer's candidates, the unit of their costs, and what the original costs, if known."""

    unit: str
    original: float | None
    points: tuple[Point, ...]


def method_looks(decisions: Iterable[Decision]) -> dict[str, Look]:
    """A look for every method that was weighed, in the order of their names."""
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
        Of one layer and method, a curve for each number of the rank.
    label : str
        What is to be seen, for those who don't see it.
    key : str
        Unique on the page: it begins every identifier within.
    """

    def draw(axes: "Axes") -> None:
        marks = [r for c in curves for r in (c.chosen, c.evbmf) if r is not None]
        longest = max([len(c.values) for c in curves] + marks)
        lowest = min(_floored(c.values[-1]) for c in curves)
        for i, curve in enumerate(curves):
            shares = [_floored(v) for v in curve.values]
            axes.plot(
                range(1, len(shares) + 1),
                shares,
                _DASHES[i % len(_DASHES)],
                color=STAND_IN["accent"],
                linewidth=1.5,
                marker="." if len(shares) < 12 else "",
            )
            _mark(axes, curve.evbmf, shares, marker="D", markersize=7, markerfacecolor="none")
            if curve.chosen is not None:
                _mark(axes, curve.chosen, shares, marker="o", markersize=6)
                axes.axvline(curve.chosen, color=STAND_IN["ink"], linewidth=0.8, linestyle=":")
                axes.annotate(
                    str(curve.chosen),
                    (curve.chosen, 1.02),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    va="bottom",
                    color=STAND_IN["ink"],
                )
        axes.set_xlim(0, longest * 1.03 + 0.5)
        _log_axis(axes, lowest, 1.0)
        _whole_axis(axes)
        _label(axes, "index of the singular value", "share of the largest")

    return _panel(draw, label, key)


def tradeoff_plot(tradeoff: Tradeoff, looks: Mapping[str, Look], label: str, key: str) -> str:
    """Predicted error of every candidate against its cost, the chosen one ringed.

    Parameters
    ----------
    tradeoff : Tradeoff
        With a point at least.
    looks : mapping of str to Look
        From ``method_looks``.
    label, key : str
        As for ``spectrum_plot``.
    """
    points, original = tradeoff.points, tradeoff.original

    def draw(axes: "Axes") -> None:
        for method in dict.fromkeys(p.method for p in points):
            line = sorted((p.cost, p.error) for p in points if p.method == method)
            look = looks[method]
            axes.plot(
                [cost for cost, _ in line],
                [error for _, error in line],
                color=STAND_IN[look.colour],
                marker=look.marker,
                markersize=5,
                linewidth=0.8,
            )
        right = max([p.cost for p in points] + ([] if original is None else [original]))
        if original is not None:
            axes.axvline(original, color=STAND_IN["muted"], linewidth=1, linestyle="--")
        for point in points:
            if point.chosen:
                _ring(axes, point, right)
        errors = [p.error for p in points]
        axes.set_xlim(0, right * 1.06 or 1)
        _log_axis(axes, min(errors) / 1.25, max(errors) * 1.25)
        _amount_axis(axes)
        _label(axes, tradeoff.unit, "relative error")

    return _panel(draw, label, key)


def swatch(look: Look, key: str) -> str:
    """A method's marker on its line, for the legend."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        colour = STAND_IN[look.colour]
        axes.plot([-0.9, 0.9], [0, 0], color=colour, linewidth=0.8)
        axes.plot([0], [0], color=colour, marker=look.marker, markersize=6)

    return to_svg(draw, (28, 14), f'class="swatch" {_DECORATIVE}', key)


def mark_swatch(mark: str, key: str) -> str:
    """What the figures mark: ``chosen``, ``evbmf``, ``ring`` or ``original``."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        ink = STAND_IN["ink"]
        if mark == "original":
            axes.axvline(0, color=STAND_IN["muted"], linewidth=1, linestyle="--")
        elif mark == "ring":
            axes.plot([0], [0], "o", color=ink, markersize=10, markerfacecolor="none")
        else:
            axes.plot([-0.9, 0.9], [0, 0], color=STAND_IN["accent"], linewidth=1.5)
            face = ink if mark == "chosen" else "none"
            shape = "o" if mark == "chosen" else "D"
            axes.plot([0], [0], shape, color=ink, markersize=6, markerfacecolor=face)

    return to_svg(draw, (28, 14), f'class="swatch" {_DECORATIVE}', key)


def tradeoff_of(decision: Decision) -> Tradeoff:
    """What was weighed for a layer, as far as an error was predicted for it.

    Costs are milliseconds where all were timed, else MACs where all are known, else parameters.
    """
    others = decision.alternatives
    unit, original = "parameters", float(decision.params_before)
    costs = [float(o.params) for o in others]
    if all(o.after_ms is not None for o in others):
        unit, costs = "ms, the layer alone", [o.after_ms or 0.0 for o in others]
        timed = (decision.before_ms, *(o.before_ms for o in others))
        original = next((ms for ms in timed if ms is not None), math.nan)
    elif all(o.macs is not None for o in others):
        unit, costs = "MACs", [float(o.macs or 0) for o in others]
        original = float(decision.macs_before or math.nan)
    taken = (decision.decision, decision.rank)
    points = [
        Point(o.method, o.rank, cost, max(o.error, SMALLEST), (o.method, o.rank) == taken)
        for o, cost in zip(others, costs, strict=True)
        if o.error is not None and math.isfinite(o.error) and math.isfinite(cost)
    ]
    return Tradeoff(unit, original if math.isfinite(original) else None, tuple(points))


def _mark(
    axes: "Axes",
    rank: int,
    shares: Sequence[float],
    *,
    marker: str,
    markersize: float,
    markerfacecolor: str = STAND_IN["ink"],
) -> None:
    at = shares[min(max(rank, 1), len(shares)) - 1]
    ink = STAND_IN["ink"]
    axes.plot(
        [rank],
        [at],
        marker=marker,
        markersize=markersize,
        markerfacecolor=markerfacecolor,
        color=ink,
        zorder=4,
    )


def _ring(axes: "Axes", point: Point, right: float) -> None:
    ink = STAND_IN["ink"]
    at = (point.cost, point.error)
    axes.plot(
        *at, "o", color=ink, markersize=12, markerfacecolor="none", markeredgewidth=1.6, zorder=4
    )
    leftwards = point.cost > right / 2
    axes.annotate(
        rank_words(point.rank),
        at,
        xytext=(-9 if leftwards else 9, 5),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        color=ink,
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
    steps = ((1,), (1, 2, 5), range(1, 10), [i / 10 for i in range(10, 100)])
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


def _amount_axis(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5))
    if axes.get_xlim()[1] >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _label(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.yaxis.set_label_coords(-0.16, 0.5)  # in line from panel to panel, however wide the ticks


def _panel(draw: Callable[["Axes"], None], label: str, key: str) -> str:
    """One plot with the axes that all panels share."""

    def fill(figure: "Figure") -> None:
        axes = figure.add_axes(_BOX)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)

    return to_svg(fill, (WIDTH, HEIGHT), f'role="img" aria-label="{said(label)}"', key)
