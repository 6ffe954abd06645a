"""The tables of the zoo: one row for each model, and why its other layers stayed as they were."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import onnxlr
from models.zoo.models import ZooModel
from onnxlr.report.reasons import counted

COLUMNS = (
    *("model", "layers found", "replaced", "kept", "MB", "million MACs"),
    *("metric", "drop (limit)", "rel. error"),
    *("by MACs", "measured speed-up (95%)", "verdict", "s"),
)
KEPT_COLUMNS = ("model", "layers kept, by kind of reason")


@dataclass(frozen=True)
class Outcome:
    """The result of one model: its report, if there is one, and what is wrong with it."""

    model: ZooModel
    max_drop: float
    samples: str
    report: dict[str, Any] | None
    failures: tuple[str, ...]


def kept_words(report: dict[str, Any]) -> str:
    """Return how many layers of a report were kept for each kind of reason."""
    return counted(r["reason"] for r in report["layers"] if r["decision"] == "keep") or "none"


def row(outcome: Outcome) -> tuple[str, ...]:
    """Return the cells of one model, in the order of ``COLUMNS``."""
    report, title = outcome.report, outcome.model.title
    if outcome.failures:
        title += " (FAILED)"
    if report is None:
        return (title, *[""] * (len(COLUMNS) - 1))
    layers, before, after = report["layers"], report["input"], report["output"]
    kept = sum(layer["decision"] == "keep" for layer in layers)
    metric, speed = report["metric"], report["speed"]
    sign = -1 if metric["name"] == "rel-error" else 1
    drop = sign * ((metric["original"] or 0) - (metric["optimized"] or 0))
    rel_error = report["fidelity"]["rel_error"]
    return (
        title,
        str(len(layers)),
        str(len(layers) - kept),
        str(kept),
        f"{before['bytes'] / 1e6:.2f} → {after['bytes'] / 1e6:.2f}",
        _change(before["macs"] / 1e6, after["macs"] / 1e6),
        metric["name"],
        f"{drop:.4f} ({outcome.max_drop:g})",
        "not finite" if rel_error is None else f"{rel_error:.4f}",
        f"{speed['theoretical_speedup']:.2f}×",
        speed_words(speed),
        speed["verdict"],
        f"{report['seconds']:.0f}",
    )


def _change(before: float, after: float) -> str:
    words = f"{before:.1f} → {after:.1f}"
    return f"{words} ({after / before - 1:+.0%})" if before else words


def speed_words(speed: dict[str, Any]) -> str:
    """Return the speed-up of a report with its 95% interval."""
    low, high = speed["speedup_interval"]
    return f"{speed['speedup']:.2f}× ({low:.2f} to {high:.2f})"


def notes(outcomes: Sequence[Outcome], provider: str, threads: int) -> list[str]:
    """Return what stands below the tables: versions, samples, metrics and failures."""
    judged: dict[str, list[str]] = {}
    for outcome in outcomes:
        judged.setdefault(outcome.samples, []).append(outcome.model.title)
    samples = "; ".join(f"{', '.join(titles)}: {words}" for words, titles in judged.items())
    failures = [f"Failure of {o.model.title}: {f}" for o in outcomes for f in o.failures]
    return [
        f"onnxlr {onnxlr.__version__}, ONNX Runtime {ort.__version__}, {platform.machine()}, "
        f"provider {provider}, {threads} thread(s), batch 1.",
        f"Judged on: {samples}. Of real samples, half are held out for it.",
        "The metrics rel-error and cosine are of the outputs; a drop of rel-error is its rise "
        "from 0. MACs are those of the main graph; by MACs is the speed-up that they promise.",
        *failures,
    ]


def content(outcomes: Sequence[Outcome], provider: str, threads: int) -> dict[str, Any]:
    """Return all outcomes as the JSON file holds them."""
    return {
        "onnxruntime_version": ort.__version__,
        "provider": provider,
        "threads": threads,
        "models": [
            {
                "name": o.model.name,
                "package": f"{o.model.package.name}=={o.model.package.version}",
                "samples": o.samples,
                "max_drop": o.max_drop,
                "failures": list(o.failures),
                "report": o.report,
            }
            for o in outcomes
        ],
    }


def show(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; only its first column is never wrapped."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*map(escape, row))
    console.print()
    console.print(table)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
