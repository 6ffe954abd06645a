"""The command: re-splits distributed to processes, and the table of the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.status import Status

import onnxlr
import onnxlr_passes
from models.promise.autoencoder import train_autoencoder
from models.promise.table import COLUMNS, show, table_rows
from models.reference.datasets import load, pixels
from models.reference.files import replace_file
from models.zoo.table import markdown as as_markdown

MODELS = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("worker.py")
_LOOK = 1.0  # seconds between two looks at the rows

Task = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, what judges it, the limits it is held to, and how many images are the population."""

    file: str
    metric: str
    limits: tuple[float, ...]
    population: int


# All of the 70,000 images would take longer than all else, of the network with convolutions most.
CASES = {
    "mlp": Case("fashion-mlp.onnx", "top1", (0.005, 0.01), 40_000),
    "cnn": Case("fashion-cnn.onnx", "top1", (0.005, 0.01), 20_000),
    "autoencoder": Case("autoencoder.onnx", "rel-error", (0.05,), 40_000),
    "autoencoder-cosine": Case("autoencoder.onnx", "cosine", (0.01,), 40_000),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder of Fashion-MNIST."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("promise"),
    help="Folder for the rows, one a run: a run that was stopped goes on from them.",
)
@click.option(
    "--case",
    "cases",
    multiple=True,
    type=click.Choice(list(CASES)),
    default=("mlp",),
    help="A model and its metric; may be repeated.",
)
@click.option(
    "--given",
    multiple=True,
    type=click.IntRange(min=2),
    default=(300, 1000, 5000),
    help="Samples that a run is given; may be repeated.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    type=click.FloatRange(min=0, max=1, min_open=True),
    show_default="0.005 and 0.01 of top1, 0.05 of rel-error, 0.01 of cosine",
    help="Largest loss, as --max-drop takes it; may be repeated.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=0),
    default=200,
    help="Re-splits of each case, number given and limit; 0 shows the table of what there is.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=2, help="Processes.")
@click.option(
    "--without",
    multiple=True,
    help="Ingredients to leave out, such as sequential: it takes longest.",
)
@click.option(
    "--latency-table",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Latencies to choose by, made by `onnxlr optimize --latency-table` on a quiet machine.  "
    "[default: estimated from the work]",
)
@click.option(
    "--python",
    default=sys.executable,
    show_default="this one",
    help="The interpreter of another installation, to run the same by another version.",
)
@click.option("--label", default="now", help="What the rows of this version are called.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
def main(
    data_dir: Path | None,
    out: Path,
    cases: tuple[str, ...],
    given: tuple[int, ...],
    limits: tuple[float, ...],
    repeats: int,
    jobs: int,
    without: tuple[str, ...],
    latency_table: Path | None,
    python: str,
    label: str,
    markdown: Path | None,
) -> None:
    """Re-split Fashion-MNIST again and again, optimize, and measure the loss on all not given.

    The population are 40,000 of its 70,000 images, and 20,000 for the larger network. Some of them
    are given, drawn at random, and what is handed over is run on all the others. The limit holds
    if the share of runs whose true loss exceeds it is no larger than one minus the confidence that
    they state. No row is made twice; those of other versions in the folder stand beside.

    \b
    Examples:
      python -m models.promise --case mlp --case cnn --repeats 20
      python -m models.promise --case mlp --python old/bin/python --label before
      python -m models.promise --repeats 0 --markdown table.md
    """
    console = Console(width=160)
    options: dict[str, Any] = {"without": list(without)}
    if latency_table is not None:
        options["latency_table"] = str(latency_table.resolve())
    # One repeat of all before the next: a run that is stopped has the same number of each.
    tasks = [
        _task(name, count, limit, repeat, options, out)
        for repeat in range(repeats)
        for name in cases
        for count in given
        for limit in limits or CASES[name].limits
    ]
    rows = out / f"{label}.jsonl"
    done = {row["key"] for row in read_rows(rows)}
    tasks = [task for task in tasks if task["key"] not in done]
    failed = False
    if tasks:
        with console.status("prepare the images"):
            _prepare(out, data_dir, any("autoencoder" in task["name"] for task in tasks))
        with console.status("begin") as status:
            failed = _work(tasks, out, rows, python, jobs, status)
    versions = {path.stem: read_rows(path) for path in sorted(out.glob("*.jsonl"))}
    show(console, versions)
    if markdown is not None:
        replace_file(markdown, f"{as_markdown(COLUMNS, table_rows(versions))}\n".encode())
    if failed:
        raise click.ClickException("some runs failed, as told above: the same command tries again")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, one JSON object a line; none if it isn't there.

    What a process that was killed had half written is no row.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _task(
    name: str, given: int, limit: float, repeat: int, options: dict[str, Any], out: Path
) -> Task:
    case = CASES[name]
    folder = out if name.startswith("autoencoder") else MODELS
    return {
        "key": f"{name} {given} {limit:g} {repeat} {' '.join(options['without'])}",
        "name": name,
        "metric": case.metric,
        "given": given,
        "limit": limit,
        "repeat": repeat,
        "population": case.population,
        "model": str((folder / case.file).resolve()),
        "options": options,
    }


def _prepare(out: Path, data_dir: Path | None, autoencoder: bool) -> None:
    """The population in two files, and the autoencoder, unless they are there."""
    population, network = out / "image.npy", out / "autoencoder.onnx"
    out.mkdir(parents=True, exist_ok=True)
    if population.exists() and (network.exists() or not autoencoder):
        return
    train, test = load("fashion", data_dir)
    if autoencoder and not network.exists():
        train_autoencoder(pixels(train.image), network)
    if not population.exists():
        images = np.concatenate([pixels(d.image).numpy() for d in (test, train)])
        labels = np.concatenate([d.label.numpy() for d in (test, train)])
        order = np.random.default_rng(0).permutation(len(labels))
        for path, array in ((out / "label.npy", labels), (population, images)):
            partial = path.with_suffix(".partial.npy")
            np.save(partial, array[order])
            partial.replace(path)


def _work(tasks: list[Task], out: Path, rows: Path, python: str, jobs: int, status: Status) -> bool:
    """Share the tasks out to processes, and wait for them; whether any failed."""
    _end_line(rows)
    before, started = len(read_rows(rows)), time.monotonic()
    with _processes(tasks, out, rows, python, jobs) as processes:
        while any(process.poll() is None for process in processes):
            time.sleep(_LOOK)
            done = len(read_rows(rows)) - before
            left = (time.monotonic() - started) * (len(tasks) / max(done, 1) - 1)
            remaining = f", about {timedelta(seconds=round(left))} left" if done else ""
            status.update(f"{done:,} of {len(tasks):,} runs{remaining}")
    return any(process.returncode for process in processes)


@contextmanager
def _processes(
    tasks: list[Task], out: Path, rows: Path, python: str, jobs: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes with their share of the tasks, which end with the context."""
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as scratch:
        environment = _environment(python) | {"TMPDIR": scratch}
        try:
            for i in range(min(jobs, len(tasks))):
                path = Path(scratch) / f"{i}.jsonl"
                path.write_text("\n".join(map(json.dumps, tasks[i::jobs])), encoding="utf-8")
                words = [python, str(WORKER), str(out.resolve()), str(path), str(rows.resolve())]
                processes.append(subprocess.Popen(words, env=environment))  # noqa: S603
            yield processes
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def _environment(python: str) -> dict[str, str]:
    """The environment of a process: this version runs from here, another from where it lies."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if python == sys.executable:
        places = {Path(str(module.__file__)).parents[1] for module in (onnxlr, onnxlr_passes)}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, sorted(places)))
    return environment


def _end_line(path: Path) -> None:
    """Let a row begin on a line of its own, behind what was half written."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
