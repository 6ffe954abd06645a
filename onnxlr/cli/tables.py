"""The tables that the commands print, and the JSON of all but ``optimize``."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from onnxlr.cli.combined import show_combined
from onnxlr.cli.frontier import show_frontier
from onnxlr.cli.width_tables import found_dict, show_found, show_widths
from onnxlr.jobs.comparison import Benchmark, ModelComparison
from onnxlr.jobs.headline import headline, speed_words
from onnxlr.jobs.inspection import Inspection
from onnxlr.plan.plan import KEEP
from onnxlr.report.report import Report, metric_row, rank_value, where_words
from onnxlr.system.session import Machine
from onnxlr.types import ms_text, rank_text
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.promise import compared


def show_report(console: Console, report: Report) -> None:
    """Print a run: a row for every layer, the model before and after, the verdict, the notes."""
    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    for column in ("layer", "op", "shape", "decision"):
        table.add_column(column, overflow="fold")
    for column in ("rank", "params", "MACs", "error"):
        table.add_column(column, justify="right")
    table.add_column("reason", overflow="fold")
    for row in report.decisions:
        replaced = row.decision != KEEP
        error = row.output_error if row.output_error is not None else row.error
        table.add_row(
            row.name,
            row.op,
            "×".join(map(str, row.shape)),
            row.decision,
            rank_text(row.rank) if row.rank else "",
            _change(row.params_before, row.params_after) if replaced else f"{row.params_before:,}",
            _change(row.macs_before, row.macs_after) if replaced else _count(row.macs_before),
            "" if error is None else f"{error:.3f}",
            row.reason,
            style=None if replaced else "dim",
        )
    if report.claim:
        console.print(report.claim, style="bold")
    if report.choice:
        console.print(report.choice, style="yellow")
    if report.claim or report.choice:
        console.print()
    console.print(table)
    console.print()
    show_widths(console, report.widths)
    _show_headline(console, report)
    console.print()
    show_combined(console, report)
    show_frontier(console, report.frontier, report.promise)
    console.print(
        f"{report.verdict} in {report.seconds:.1f} s; verified: {report.verified}", style="bold"
    )
    for note in report.notes:
        console.print(f"note: {note}", style="yellow")


def show_comparison(console: Console, result: ModelComparison) -> None:
    """Print two models side by side."""
    _show_headline(console, result)
    console.print(f"\non {result.fed}")
    if not result.metric.named:
        console.print(f"note: {result.metric.line_without_limit}", style="yellow")


def show_inspection(console: Console, rows: Inspection, params: int, notes: Sequence[str]) -> None:
    """Print a row for every method that fits a layer; one with the reasons if none does.

    ``params`` counts those of the whole file.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("layer", "op", "shape", "method"):
        table.add_column(column, overflow="fold")
    for column in ("full rank", "break-even", "EVBMF", "90% energy", "99% energy"):
        table.add_column(column, justify="right")
    table.add_column("spectrum", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in rows:
        layer = row.layer
        head = (layer.name, layer.op, "×".join(map(str, layer.shape)))
        if not row.fits:
            reason = "; ".join(dict.fromkeys(row.reasons))
            table.add_row(*head, "", "", "", "", "", "", "", reason, style="dim")
        for fit in row.fits:
            table.add_row(
                *head,
                fit.method,
                rank_text(fit.full_rank),
                rank_text(fit.break_even),
                rank_text(fit.evbmf),
                rank_text(fit.energy[0.9]),
                rank_text(fit.energy[0.99]),
                " ".join(sparkline(v.max(axis=0), 24 // len(fit.values)) for v in fit.values),
                "no rank saves anything" if 0 in fit.break_even else "",
            )
    console.print(table)
    users = sum(len(r.layer.uses) for r in rows)
    fitting = sum(any(0 not in f.break_even for f in r.fits) for r in rows)
    console.print(
        f"\n{len(rows)} layers, used by {users} nodes, {sum(r.layer.params for r in rows):,} of "
        f"the file's {params:,} parameters (vectors and small arrays aren't listed); {fitting} "
        "can be factorized with a saving",
    )
    show_found(console, rows.widths)
    for note in notes:
        console.print(f"note: {note}", style="yellow")


def show_benchmark(console: Console, a: str, b: str | None, result: Benchmark) -> None:
    """Print the times of a model; of two, also their ratio with its interval."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", overflow="fold")
    for column in ("min ms", "median ms", "90% ms"):
        table.add_column(column, justify="right")
    pairs = [(a, result.a)]
    if b is not None and result.comparison is not None:
        pairs.append((b, result.comparison.b))
    for name, timing in pairs:
        table.add_row(
            name, ms_text(timing.min_ms), ms_text(timing.median_ms), ms_text(timing.p90_ms)
        )
    console.print(table)
    where = where_words(result.machine, result.batch)
    if result.comparison is None:
        console.print(where)
        return
    console.print(f"{speed_words(result.comparison)}; {where}")


def sparkline(values: Any, width: int = 24) -> str:
    """A falling spectrum as a line of blocks, whose heights are relative to the largest value.

    Examples
    --------
    >>> sparkline([8.0, 4.0, 2.0, 1.0])
    '█▄▂▁'
    """
    blocks = " ▁▂▃▄▅▆▇█"
    top = float(values[0]) if len(values) else 0.0
    if top == 0.0:
        return blocks[0] * min(width, len(values))
    picks = (
        [values[i * len(values) // width] for i in range(width)]
        if len(values) > width
        else list(values)
    )
    return "".join(blocks[math.ceil(8 * float(v) / top)] for v in picks)


def inspection_dict(rows: Inspection, params: int) -> dict[str, Any]:
    """The content that ``inspect --json`` writes; ``params`` counts those of the whole file."""
    return {
        "params": params,
        "layers": [
            {
                "name": r.layer.name,
                "op": r.layer.op,
                "shape": list(r.layer.shape),
                "users": [u.node.name or u.node.outputs[0].name for u in r.layer.uses],
                "params": r.layer.params,
                "macs": r.layer.macs,
                "reasons": list(dict.fromkeys(r.reasons)),
                "methods": [
                    {
                        "name": f.method,
                        "full_rank": rank_value(f.full_rank),
                        "break_even": rank_value(f.break_even),
                        "evbmf": rank_value(f.evbmf),
                        "energy": {str(p): rank_value(r) for p, r in f.energy.items()},
                        "spectra": [v.max(axis=0).tolist() for v in f.values],
                    }
                    for f in r.fits
                ],
            }
            for r in rows
        ],
        "widths": found_dict(rows.widths),
    }


def comparison_dict(result: ModelComparison) -> dict[str, Any]:
    """The content that ``compare --json`` writes."""
    return {
        "a": vars(result.a),
        "b": vars(result.b),
        "metric": metric_row(result.quality, result.metric) | _interval_row(result.quality),
        "fidelity": vars(result.quality.fidelity),
        "speed": {
            **_where(result.machine, result.batch),
            "original_ms": result.speed.a.median_ms,
            "optimized_ms": result.speed.b.median_ms,
            "speedup": result.speed.speedup,
            "speedup_interval": [result.speed.low, result.speed.high],
            "verdict": result.speed.verdict,
            "settled": result.speed.settled,
            "busy": result.speed.busy,
            "theoretical_speedup": result.theoretical_speedup,
        },
        "limits": vars(result.bounds) | {"violations": list(result.violations)},
    }


def _interval_row(quality: Quality) -> dict[str, Any]:
    """The loss, between which ends it is, and the confidence of each of those."""
    promise = compared(quality.metric)
    interval = promise.interval(quality)
    return {
        "loss": quality.drop,
        "interval": None if interval is None else list(interval),
        "confidence": promise.interval_confidence,
    }


def benchmark_dict(result: Benchmark) -> dict[str, Any]:
    """The content that ``bench --json`` writes."""
    content = {**_where(result.machine, result.batch), "a": vars(result.a)}
    if result.comparison is not None:
        content |= {
            "b": vars(result.comparison.b),
            "rounds": result.comparison.rounds,
            "speedup": result.comparison.speedup,
            "speedup_interval": [result.comparison.low, result.comparison.high],
            "verdict": result.comparison.verdict,
            "settled": result.comparison.settled,
            "busy": result.comparison.busy,
        }
    return content


def _show_headline(console: Console, result: Report | ModelComparison) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in headline(result):
        table.add_row(*row)
    console.print(table)


def _where(machine: Machine, batch: int) -> dict[str, Any]:
    return {"provider": machine.provider, "threads": machine.threads, "batch": batch}


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "?"
    return f"{before:,} → {after:,}"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
