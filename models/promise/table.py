"""The table of the experiment: how often the limit broke, beside what was stated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
COLUMNS = (
    *("version", "case", "given", "limit", "runs", "loss above the limit (95%)"),
    *("stated", "holds", "no gain", "median MACs", "median speed-up (predicted)"),
)
_ROUNDING = 1e-9  # of a difference of two shares


@dataclass(frozen=True)
class Summary:
    """The runs of one version, case, number given and limit.

    Attributes
    ----------
    runs, broken, unchanged : int
        All, those whose true loss exceeds the limit, and those that replaced nothing.
    stated : float or None
        The largest share that may break by the confidences that the runs state; None where they
        state none.
    macs, speedup : float
        Medians of the share of multiply-accumulates that is left, and of the speed-up that the
        layers' latencies predict.
    """

    runs: int
    broken: int
    unchanged: int
    stated: float | None
    macs: float
    speedup: float

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the true share of broken limits, at 95% (Clopper & Pearson)."""
        ends = scipy.stats.binomtest(self.broken, self.runs).proportion_ci(0.95, "exact")
        return float(ends.low), float(ends.high)

    @property
    def holds(self) -> bool | None:
        """Whether the share is within what was stated, but for its sampling error."""
        return None if self.stated is None else self.interval[0] <= self.stated


def summarize(rows: Sequence[Row]) -> Summary:
    """What the runs of one configuration come to."""
    confidences = [row["confidence"] for row in rows]
    stated = None if None in confidences else float(np.mean([1 - c for c in confidences]))
    return Summary(
        len(rows),
        sum(row["loss"] > row["limit"] + _ROUNDING for row in rows),
        sum(not row["replaced"] for row in rows),
        stated,
        float(np.median([row["macs"] for row in rows])),
        float(np.median([1 / row["ms"] for row in rows])),
    )


def cells(version: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """A row of the table."""
    first, summary = rows[0], summarize(rows)
    low, high = summary.interval
    return (
        version,
        first["name"],
        f"{first['given']:,}",
        f"{first['limit']:g}",
        str(summary.runs),
        f"{summary.broken / summary.runs:.1%} ({low:.1%} to {high:.1%})",
        "nothing" if summary.stated is None else f"at most {summary.stated:.0%}",
        {True: "yes", False: "no", None: ""}[summary.holds],
        f"{summary.unchanged / summary.runs:.0%}",
        f"{summary.macs:.0%}",
        f"{summary.speedup:.2f}×",
    )


def table_rows(versions: Mapping[str, Sequence[Row]]) -> list[tuple[str, ...]]:
    """The rows of the table, versions of the same configuration below each other."""
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for version, rows in versions.items():
        for row in rows:
            key = (row["name"], row["given"], row["limit"])
            groups.setdefault(key, {}).setdefault(version, []).append(row)
    return [cells(version, rows) for key in sorted(groups) for version, rows in groups[key].items()]


def show(console: Console, versions: Mapping[str, Sequence[Row]]) -> None:
    """Print the table."""
    table = Table(*COLUMNS, box=None, header_style="bold", pad_edge=False)
    for row in table_rows(versions):
        table.add_row(*row)
    console.print(table)
