"""The rows of the composition tables, and how they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

_FULL = 160  # characters of a failure


@dataclass
class Row:
    """One file, its quality and its speed; the JSON holds the same fields.

    Attributes
    ----------
    model, step, title : str
    failure : str or None
        Why there is no such file, or none that opens.
    complaint : str or None
        What onnx.checker says against it.
    bytes : int
    metric : str
    value, drop, rel_error : float
        The metric, what it lost against the original, and the relative error of the outputs.
    weights : dict of str to int
        How many are stored in which type.
    replaced, layers : int or None
        Of the last step, where that is onnxlr's.
    kept : str
        Why onnxlr kept the others.
    speed : (float, float, float) or None
        Of the original's time by this one's, with its interval.
    milliseconds : (float, float) or None
    """

    model: str
    step: str
    title: str
    failure: str | None = None
    complaint: str | None = None
    bytes: int = 0
    metric: str = ""
    value: float = 0.0
    drop: float = 0.0
    rel_error: float = 0.0
    weights: dict[str, int] = field(default_factory=dict)
    replaced: int | None = None
    layers: int | None = None
    kept: str = ""
    speed: Sequence[float] | None = None
    milliseconds: Sequence[float] | None = None


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of Markdown of one table for each model."""
    for model, group in groupby(rows, key=lambda row: row.model):
        some = list(group)
        metric = next((row.metric.rpartition(":")[2] for row in some if row.metric), "")
        yield (
            f"| {model} | MB | {metric} | drop | rel. error | weights as | checker | speed-up "
            "(95%) | onnxlr replaced | and kept |"
        )
        yield "| --- | ---: | ---: | ---: | ---: | --- | --- | --- | --- | --- |"
        for row in some:
            yield f"| {' | '.join(cell.replace('|', '/') for cell in _cells(row))} |"
        yield ""


def behind_table(said: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of Markdown of what ``onnxlr optimize --behind`` says of a model."""
    metric = said["metric"].rpartition(":")[2]
    yield f"| {said['model']} | loss ({metric}) | between | ms | speed-up | MB | within the limit |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for row in said["rows"]:
        ends = "" if row["interval"] is None else " to ".join(f"{x:.4f}" for x in row["interval"])
        cells = (
            row["what"],
            f"{row['loss']:.4f}",
            ends,
            f"{row['ms']:.3f}",
            f"{row['speedup']:.2f}×",
            f"{row['bytes'] / 1e6:.2f}",
            "yes" if row["within_limit"] else "no",
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"{said['verdict']}."
    yield ""


def _cells(row: Row) -> tuple[str, ...]:
    if row.failure:
        short = row.failure if len(row.failure) <= _FULL else f"{row.failure[: _FULL - 1]}…"
        return (row.title, *[""] * 8, f"fails: {short}")
    speed = ""
    if row.speed is not None:
        ratio, low, high = row.speed
        speed = f"{ratio:.2f}× ({low:.2f} to {high:.2f})"
    return (
        row.title,
        f"{row.bytes / 1e6:.2f}",
        f"{row.value:.4f}",
        f"{row.drop:.4f}",
        f"{row.rel_error:.4f}",
        ", ".join(f"{count} {kind}" for kind, count in row.weights.items()),
        row.complaint or "ok",
        speed,
        "" if row.replaced is None else f"{row.replaced} of {row.layers}",
        row.kept,
    )
