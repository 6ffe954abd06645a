"""The table of methods that ``passes`` prints."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from onnxlr.methods.channels import INTERPOLATIVE
from onnxlr.methods.registry import InstalledPass

PASS_COLUMNS = ("method", "replaces", "by", "paper", "from")


def pass_rows(passes: Mapping[str, InstalledPass]) -> list[tuple[str, ...]]:
    """A row of ``PASS_COLUMNS`` for every method."""
    return [
        (
            name,
            ", ".join(e.graph_pass.ops) or "any operator",
            e.graph_pass.summary,
            e.graph_pass.paper,
            e.distribution,
        )
        for name, e in passes.items()
    ] + [(*vars(INTERPOLATIVE).values(), "onnxlr")]


def show_passes(
    console: Console, passes: Mapping[str, InstalledPass], broken: Mapping[str, str]
) -> None:
    """Print a row for every method, and a line for each that can't be used."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in PASS_COLUMNS:
        table.add_column(column, overflow="fold")
    for row in pass_rows(passes):
        table.add_row(*row)
    console.print(table)
    for reason in broken.values():
        console.print(f"not usable: {reason}", markup=False)
