"""The table that compares low rank, the step of ``--behind``, both and neither."""

from rich.console import Console
from rich.table import Table

from onnxlr.report.combined_table import COLUMNS, combined_rows
from onnxlr.report.report import Report


def show_combined(console: Console, report: Report) -> None:
    """Print the files that somebody may use in the end; nothing without ``--behind``."""
    if report.behind is None:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for kind, column in COLUMNS:
        table.add_column(column, justify="right" if kind == "number" else "left", overflow="fold")
    for row in combined_rows(report):
        table.add_row(*row)
    console.print(table)
    console.print(report.behind.verdict, style="bold")
    console.print()
