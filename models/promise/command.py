"""The command: re-splits shared out to processes, and the table of what came out."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from models.promise.autoencoder import train_autoencoder
from models.promise.table import show
from models.reference.datasets import Data, load, pixels

MODELS = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("worker.py")
# Name of a case: the file, the metric, and how many images are the population: all of the 70,000
# would take longer than all else.
CASES = {
    "mlp": ("fashion-mlp.onnx", "top1", 40_000),
    "cnn": ("fashion-cnn.onnx", "top1", 20_000),
    "autoencoder": ("autoencoder.onnx", "rel-error", 40_000),
    "autoencoder-cosine": ("autoencoder.onnx", "cosine", 40_000),
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
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=("mlp",))
@click.option("--given", multiple=True, type=int, default=(300, 1000, 5000))
@click.option("--limit", "limits", multiple=True, type=float, default=(0.005, 0.01))
@click.option("--repeats", default=200, help="Re-splits of each case, number given and limit.")
@click.option("--jobs", default=2, help="Processes.")
@click.option(
    "--without",
    multiple=True,
    help="Ingredients to leave out, such as sequential: it takes longest.",
)
@click.option("--latency-table", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--python",
    default=sys.executable,
    help="The interpreter of another installation, to run the same by another version.",
)
@click.option("--label", default="now", help="What the rows of this version are called.")
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
) -> None:
    """Re-split Fashion-MNIST again and again, optimize, and measure the loss on all not given.

    The population are 40,000 of its 70,000 images, and 20,000 for the larger network. Some of them
    are given, drawn at random, and what is handed over is run on all the others. The limit holds
    if the share of runs whose true loss exceeds it is no larger than one minus the confidence that
    they state.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = out / f"{label}.jsonl"
    _prepare(out, data_dir, any(name.startswith("autoencoder") for name in cases))
    options: dict[str, Any] = {"without": list(without)}
    if latency_table is not None:
        options["latency_table"] = str(latency_table)
    done = {row["key"] for row in read_rows(rows)}
    # One repeat of all before the next: a run that is stopped has the same number of each.
    tasks = [
        _task(name, count, limit, repeat, options, out)
        for repeat in range(repeats)
        for name in cases
        for count in given
        for limit in limits
    ]
    _work([task for task in tasks if task["key"] not in done], out, rows, python, jobs)
    show({path.stem: read_rows(path) for path in sorted(out.glob("*.jsonl"))})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, one JSON object a line; none if it isn't there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _task(
    name: str, given: int, limit: float, repeat: int, options: dict[str, Any], out: Path
) -> dict[str, Any]:
    file, metric, population = CASES[name]
    folder = out if name.startswith("autoencoder") else MODELS
    return {
        "key": f"{name} {given} {limit:g} {repeat} {' '.join(options['without'])}",
        "name": name,
        "metric": metric,
        "given": given,
        "limit": limit,
        "repeat": repeat,
        "population": population,
        "model": str((folder / file).resolve()),
        "options": options,
    }


def _prepare(out: Path, data_dir: Path | None, autoencoder: bool) -> None:
    """The population in two files, and the autoencoder, unless they are there."""
    population, network = out / "image.npy", out / "autoencoder.onnx"
    if population.exists() and (network.exists() or not autoencoder):
        return
    train, test = load("fashion", data_dir)
    if autoencoder and not network.exists():
        train_autoencoder(Data(pixels(train.image), train.label), network)
    if not population.exists():
        images = np.concatenate([pixels(d.image).numpy() for d in (test, train)])
        labels = np.concatenate([d.label.numpy() for d in (test, train)])
        order = np.random.default_rng(0).permutation(len(labels))
        np.save(out / "label.npy", labels[order])
        np.save(population, images[order])


def _work(tasks: list[dict[str, Any]], out: Path, rows: Path, python: str, jobs: int) -> None:
    """Share the tasks out to processes, and wait for them."""
    with tempfile.TemporaryDirectory() as scratch:
        processes = []
        for i in range(min(jobs, len(tasks))):
            path = Path(scratch) / f"{i}.jsonl"
            path.write_text("\n".join(json.dumps(t) for t in tasks[i::jobs]), encoding="utf-8")
            words = [python, str(WORKER), str(out.resolve()), str(path), str(rows.resolve())]
            processes.append(subprocess.Popen(words))  # noqa: S603
        try:
            while any(process.poll() is None for process in processes):
                time.sleep(1.0)
        finally:
            for process in processes:
                process.terminate()
    for process in processes:
        if process.returncode:
            raise click.ClickException(f"a process ended with code {process.returncode}")
