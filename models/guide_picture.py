"""Command that draws the frontiers of runs of ``onnxlr optimize``, from the JSON that they wrote.

``python -m models.guide_picture float.json int8.json --out guide.svg`` draws the loss of every
model that was judged against its milliseconds, one colour a run, what was handed over with a ring,
and the limit as a line. It made the picture of GUIDE.md.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from models.reference.files import replace_file
from onnxlr.report.svg import start_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#2a6f97", "#c8553d", "#588157", "#7a5195")
_GREY = "#808080"  # to be read on white and on black
_SIZE = (6.6, 3.4)  # inches


def best_of(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points that no other beats in both loss and time, from fast to slow."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["ms"], p["loss"])):
        if not best or point["loss"] < best[-1]["loss"]:
            best.append(point)
    return best


def picture(reports: Sequence[dict[str, Any]]) -> str:
    """Return the text of an SVG file."""
    start_figures()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "onnxlr", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for report, colour in zip(reports, _COLOURS, strict=False):
            _draw(axes, report, colour)
        axes.axhline(100 * reports[0]["metric"]["limit"], color=_GREY, linestyle="--", linewidth=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds of one run", color=_GREY)
        axes.set_ylabel(f"{reports[0]['metric']['name']} lost, points", color=_GREY)
        axes.tick_params(colors=_GREY)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(_GREY)
        axes.legend(frameon=False, labelcolor=_GREY, loc="center right")
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return file.getvalue()


def _draw(axes: Axes, report: dict[str, Any], colour: str) -> None:
    points = [p for p in report["frontier"] if p["ms"] is not None]
    name = "low rank" if report["behind"] is None else f"low rank, then {report['behind']['name']}"
    axes.plot(*_places(points), "o", color=colour, markersize=3, alpha=0.5)
    axes.plot(*_places(best_of(points)), "o-", color=colour, markersize=4, linewidth=1, label=name)
    chosen = [p for p in points if p["chosen"]]
    axes.plot(*_places(chosen), "o", color=colour, markersize=11, fillstyle="none")


def _places(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [p["ms"] for p in points], [100 * p["loss"] for p in points]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The SVG file.")
def main(reports: tuple[Path, ...], out: Path) -> None:
    """Draw the frontiers of runs."""
    texts = [json.loads(path.read_text(encoding="utf-8")) for path in reports]
    replace_file(out, picture(texts).encode())


if __name__ == "__main__":
    main()
