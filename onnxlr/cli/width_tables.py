"""The tables of widths that ``optimize`` and ``inspect`` print."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from onnxlr.plan.plan import KEEP
from onnxlr.plan.width_plan import WidthDecision
from onnxlr.widths.find import Width


def show_widths(console: Console, rows: Sequence[WidthDecision]) -> None:
    """Print a row for every width: its channels, how many stay, and why."""
    if not rows:
        return
    table = _table(("channels", "stay", "error"))
    for row in rows:
        kept = row.decision == KEEP
        table.add_row(
            row.name,
            row.decision,
            f"{row.size:,}",
            "" if row.kept is None else f"{len(row.kept):,}",
            "" if row.error is None else f"{row.error:.3f}",
            row.reason,
            style="dim" if kept else None,
        )
    console.print(table)
    console.print()


def show_found(console: Console, rows: Sequence[Width]) -> None:
    """Print a row for every width: who writes, carries and reads it, or why it has to stay."""
    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("width written by", overflow="fold")
    table.add_column("channels", justify="right")
    for column in ("carried by", "read by", "reason"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            ", ".join(row.writers),
            f"{row.size:,}",
            ", ".join(row.carriers),
            ", ".join(row.readers),
            row.refusal or "",
            style="dim" if row.refusal else None,
        )
    console.print()
    console.print(table)
    usable = sum(row.refusal is None for row in rows)
    console.print(f"\n{len(rows)} widths; {usable} can be narrowed")


def found_dict(rows: Sequence[Width]) -> list[dict[str, Any]]:
    """What ``inspect --json`` says of widths."""
    return [
        {
            "name": row.name,
            "size": row.size,
            "writers": list(row.writers),
            "carriers": list(row.carriers),
            "readers": list(row.readers),
            "reason": row.refusal,
        }
        for row in rows
    ]


def _table(numbers: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("width", "decision"):
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    table.add_column("reason", overflow="fold")
    return table
