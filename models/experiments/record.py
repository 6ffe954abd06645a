"""Rows of an experiment: computed once, kept on disk, written as CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import io
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import torch
from rich.console import Console

from models.reference.files import append_line, replace_file
from onnxlr.verify.latency_file import processor
from onnxlr.version import __version__

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file: a line of JSON each, with "key", "settings" and "row".

    Raises click.ClickException when a line is none.
    """
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise click.ClickException(
            f"{path} can't be read ({type(error).__name__}); name another --out."
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            row = dict(content["row"])
            row["seconds"] = float(row["seconds"])
            key, settings = str(content["key"]), dict(content["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise click.ClickException(
                f"{path}, line {number}, can't be read as a row ({type(error).__name__}); delete "
                "the line or name another --out."
            ) from error
        records.append({"key": key, "settings": settings, "row": row})
    return records


class Record:
    """The rows of one experiment in a folder, a line of a file each.

    A row that is there isn't computed again: an experiment that was stopped goes on where it was,
    and two processes may compute different rows of one.

    Parameters
    ----------
    name : str
        Of the files: name.csv, name.md, name.png, and rows as they were measured in name.jsonl.
    folder : Path
    settings : mapping
        What all rows have in common. Rows of other settings aren't mixed in.
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.console = folder, Console(highlight=False, soft_wrap=True)
        self._name = name
        self._settings = json.loads(json.dumps(dict(settings)))
        self._seconds = 0.0

    def row(self, key: str, compute: Callable[[], Row]) -> Row:
        """Return the row of a key with its wall time, computed and saved unless it is there.

        Raises click.ClickException when the saved one was measured with other settings.
        """
        path = self._path("jsonl")
        for record in read_records(path):
            if record["key"] == key:
                self._check(record["settings"], f"{path}: {key}")
                row: Row = record["row"]
                break
        else:
            start = time.perf_counter()
            row = compute()
            row.setdefault("seconds", round(time.perf_counter() - start, 1))
            line = json.dumps({"key": key, "settings": self._settings, "row": row})
            append_line(path, line)
            self.console.print(f"{key}: {row['seconds']} s")
        self._seconds += row["seconds"]
        return row

    def _check(self, settings: Mapping[str, Any], what: str) -> None:
        if settings != self._settings:
            changes = [
                f"{n} {settings.get(n)!r} (now {self._settings.get(n)!r})"
                for n in sorted({*settings, *self._settings})
                if settings.get(n) != self._settings.get(n)
            ]
            raise click.ClickException(
                f"{what} was measured with {', '.join(changes)}; use the same settings, or name "
                "another --out."
            )

    def write(
        self,
        title: str,
        columns: Mapping[str, str],
        rows: Sequence[Row],
        draw: Callable[[Axes], None],
        notes: Sequence[str] = (),
    ) -> None:
        """Write the table and the plot, and print the table.

        Parameters
        ----------
        columns : mapping of str to str
            From a row's key to the format of its values (``".2%"``; ``""`` as they are).
        rows : sequence of dict
            A key that a row lacks leaves a gap.
        draw : callable
            Draws the rows on axes.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, [*columns], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self._path("csv"), text.getvalue().encode())

        def cell(row: Row, key: str) -> str:
            value = row.get(key)
            return "" if value is None else format(value, columns[key])

        lines = [
            f"| {' | '.join(key.replace('_', ' ') for key in columns)} |",
            f"|{'|'.join(' ---: ' if form else ' --- ' for form in columns.values())}|",
            *(f"| {' | '.join(cell(row, key) for key in columns)} |" for row in rows),
        ]
        settings = ", ".join(f"{name} {value}" for name, value in self._settings.items())
        tail = [
            f"Settings: {settings}.",
            f"{processor()}, {torch.get_num_threads()} thread(s), "
            f"{'CUDA' if torch.cuda.is_available() else 'no GPU'}; Python "
            f"{platform.python_version()}, torch {torch.__version__}, onnxlr {__version__}; "
            f"{self._seconds / 60:.1f} minutes in all.",
        ]
        shown = "\n".join([f"# {title}", "", *lines, "", *notes, *tail])
        replace_file(self._path("md"), f"{shown}\n".encode())
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        draw(axes)
        axes.set_title(title, fontsize=10)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
        plt.close(figure)
        replace_file(self._path("png"), picture.getvalue())
        self.console.print(shown, markup=False)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._name}.{suffix}"


def label_accuracy(axes: Axes, x: str, original: float) -> None:
    """Finish a plot of accuracies in percent over x, beside the original network's (a fraction)."""
    axes.axhline(100 * original, color="grey", linestyle=":", label="original")
    axes.set_xlabel(x)
    axes.set_ylabel("top-1, %")
    axes.legend()


def note_on_seeds(original: float, images: int, seeds: Sequence[int]) -> str:
    """Return the note below means over seeds: the original (a fraction), and the spread."""
    return (
        f"Original {original:.2%} on {images:,} test images; spread: standard deviation over seeds "
        f"{', '.join(map(str, seeds))}, in points."
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation of a sample, 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def out_option(function: Callable[..., None]) -> Callable[..., None]:
    """Add ``--out``, the folder of an experiment's files."""
    return click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        required=True,
        help="Folder for the table, the plot and checkpoints; a second run goes on from it.",
    )(function)


def quick_option(function: Callable[..., None]) -> Callable[..., None]:
    """Add ``--quick``, which only shows that everything runs."""
    return click.option(
        "--quick",
        is_flag=True,
        help="Few images, steps and rows: shows in a minute that everything runs, no result.",
    )(function)
