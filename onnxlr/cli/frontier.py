"""The table of the frontier: what more or less loss would buy."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from onnxlr.plan.frontier import Point
from onnxlr.verify.promise import Promise

_ROWS = 8  # that the console shows
_TITLE = "What a larger or smaller --max-drop would buy (losses on the samples used for choosing):"


def show_frontier(console: Console, points: Sequence[Point], promise: Promise | None) -> None:
    """Print what more, or less, loss would buy: the models that no other beats."""
    rows = [p for p in points if _marked(p) or not any(other.beats(p) for other in points)]
    if promise is None or len(rows) < 2:
        return
    console.print(_TITLE)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("loss", "from", "to", "ms", "speed-up", "bytes", "layers"):
        table.add_column(column, justify="right")
    table.add_column("")
    original = next((p.ms for p in points if not p.layers), None)
    for point in _spread(rows, _ROWS):
        ratio = "" if not original or not point.ms else f"{original / point.ms:.2f}×"
        table.add_row(
            promise.text(point.loss),
            "" if point.low is None else promise.text(point.low),
            "" if point.high is None else promise.text(point.high),
            _milliseconds(point),
            ratio,
            f"{point.bytes:,}",
            str(point.layers),
            "← this one" if point.chosen else point.refused,
            style=None if point.chosen else "dim",
        )
    console.print(table)
    if any(point.refused for point in rows):
        console.print("Bolder models than the one that failed were not tested.")
    console.print()


def _marked(point: Point) -> bool:
    """Whether something is said of a point, so that it has to be shown."""
    return point.chosen or bool(point.refused)


def _milliseconds(point: Point) -> str:
    if point.ms is None:
        return ""
    return f"{point.ms:.4f}" + ("" if point.measured else " predicted")


def _spread(rows: Sequence[Point], most: int) -> list[Point]:
    """About so many points, evenly spread, with those of which something is said."""
    if len(rows) <= most:
        return list(rows)
    picks = {round(i * (len(rows) - 1) / (most - 1)) for i in range(most)}
    return [p for i, p in enumerate(rows) if i in picks or _marked(p)]
