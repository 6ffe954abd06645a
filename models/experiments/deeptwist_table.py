"""The Markdown table of all runs that ``models.experiments.deeptwist`` has recorded in a folder.

``python -m models.experiments.deeptwist_table --out FOLDER``: a row for each way to train, its
compression and its schedule, with the seeds side by side. It trains nothing.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import click

from models.experiments.record import Row, mean_and_spread, out_option, read_records
from models.reference.files import tell_table

_HEAD = (
    *("compression", "trained", "steps", "learning rate", "S_D", "distortions", "truncated"),
    *("accuracy", "spread", "each seed", "minutes a run"),
)


def lines(records: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table.

    Runs are of one row when they differ in nothing but the seed, in settings that the table doesn't
    show neither.
    """
    made = [f"| {' | '.join(_HEAD)} |", f"|{' --- |' * len(_HEAD)}"]
    for _, group in groupby(sorted(records, key=_key), key=_key):
        of_a_row = sorted(group, key=lambda record: int(record["row"]["seed"]))
        made.append(_line([r["row"] for r in of_a_row], of_a_row[0]["settings"]))
    return made


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    row = record["row"]
    distorted = row["every"] or 0
    shown = (round(row["compression"], 2), row["column"], row["steps"], row["schedule"], distorted)
    return (*shown, sorted(map(str, record["settings"].items())))


def _line(rows: list[Row], settings: dict[str, Any]) -> str:
    first = rows[0]
    ends = [row["accuracy"] for row in rows]
    mean, spread = mean_and_spread(ends)
    every = first["every"]
    cells = (
        f"{first['compression']:.2f}",
        first["column"],
        f"{first['steps']:,} of {settings['batch_size']} images",
        f"{settings['lr']:g}, {first['schedule']}",
        "" if every is None else f"{every}",
        "" if every is None else f"{first['distortions']}",
        f"{first['truncated']:.2%}",
        f"{mean:.2%}",
        f"{100 * spread:.2f}" if len(rows) > 1 else "",
        ", ".join(f"{row['seed']}: {row['accuracy']:.2%}" for row in rows),
        f"{sum(row['seconds'] for row in rows) / len(rows) / 60:.1f}",
    )
    return f"| {' | '.join(cells)} |"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@out_option
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table here too.")
def main(out: Path, markdown: Path | None) -> None:
    """Print a table of all runs in a folder."""
    path = out / "deeptwist.jsonl"
    records = read_records(path)
    if not records:
        raise click.ClickException(
            f"{path} has no runs; name the --out of models.experiments.deeptwist."
        )
    tell_table(lines(records), markdown)


if __name__ == "__main__":
    main()
