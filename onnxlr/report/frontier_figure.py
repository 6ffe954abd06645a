"""The section of the HTML page on the frontier: loss against time, with the chosen model marked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxlr.plan.frontier import Point
from onnxlr.report.markup import escape, section, table, table_row
from onnxlr.report.plots import MARKS, amount_axis, draw_panel, label_axes
from onnxlr.report.report import Report
from onnxlr.report.svg import STAND_IN
from onnxlr.verify.promise import Promise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = (
    ("word", ""),
    ("number", "loss"),
    ("number", "between"),
    ("number", "ms"),
    ("number", "bytes"),
    ("number", "layers replaced"),
    ("word", "plan"),
)
_WORDS = (
    "Every model that was built and judged. Losses are those on the samples used for choosing, "
    "with intervals; the top of this page has the loss of the written model on the test samples. "
    "A larger --max-drop moves to the left, a smaller one to the right; "
    "--frontier DIR writes the plan of each, from which onnxlr apply makes the model."
)


def frontier_section(report: Report) -> str:
    """The section of the models that were judged; empty if there were no two of them."""
    promise, points = report.promise, report.frontier
    if promise is None or len(points) < 2:
        return ""
    label = f"Loss of {len(points)} models against milliseconds, or bytes"
    chosen = next((i for i, point in enumerate(points) if point.chosen), None)
    if chosen is not None:
        label += f"; the chosen one loses {promise.text(points[chosen].loss)}"
    rows = [_row(point, promise) for point in points]
    return section(
        "What more or less loss would buy",
        f"<p>{escape(_WORDS)}</p>",
        f'<figure class="panel">{_curve(points, promise, label)}</figure>',
        table("Every model that was judged", _COLUMNS, rows),
    )


def _row(point: Point, promise: Promise) -> str:
    between = "–"
    if point.low is not None and point.high is not None:
        between = f"{promise.text(point.low)} to {promise.text(point.high)}"
    texts = (
        promise.text(point.loss),
        between,
        "–" if point.ms is None else f"{point.ms:.4f}" + ("" if point.measured else " predicted"),
        f"{point.bytes:,}",
        str(point.layers),
        point.file_name,
    )
    head, kind = ("this one", "") if point.chosen else ("", "kept")
    return table_row(head, _COLUMNS, texts, kind)


def _curve(points: Sequence[Point], promise: Promise, label: str) -> str:
    """Losses with their intervals against milliseconds, or megabytes where those aren't known."""
    timed = all(point.ms is not None for point in points)

    def cost(point: Point) -> float:
        return point.ms if timed and point.ms is not None else point.bytes / 1e6

    unit = 100.0 if promise.in_points else 1.0

    def draw(axes: "Axes") -> None:
        for point in points:
            if point.low is not None and point.high is not None:
                ends = [unit * point.low, unit * point.high]
                axes.plot([cost(point)] * 2, ends, color=STAND_IN["axis"], linewidth=0.8)
        best = [p for p in points if not any(other.beats(p) for other in points)]
        axes.plot(
            [cost(p) for p in best],
            [unit * p.loss for p in best],
            color=STAND_IN["accent"],
            linewidth=1.2,
        )
        for point in points:
            colour = STAND_IN["accent"] if point in best else STAND_IN["muted"]
            at = [cost(point)], [unit * point.loss]
            axes.plot(*at, color=colour, marker="o", markersize=4)
            if point.chosen:
                axes.plot(*at, **MARKS["ring"], zorder=4)
        if promise.tested and promise.limit < 1:
            axes.axhline(unit * promise.limit, color=STAND_IN["muted"], linewidth=1, linestyle="--")
        axes.set_xlim(0, 1.06 * max(cost(p) for p in points))
        amount_axis(axes)
        loss = f"{promise.metric} lost" + (", points" if promise.in_points else "")
        label_axes(axes, "ms" if timed else "megabytes", loss)

    return draw_panel(draw, label, "frontier")
