"""Structured pruning of public models beside onnxlr, at equal measured latency.

``python -m models.zoo.rival --cache zoo-cache`` has onnxsim (``pip install onnxsim``, 0.7 or newer)
take whole channels from models of the zoo at several sparsities, by the norms of weights and of
activations on samples that onnxlr fits to as well. onnxlr makes the models of its frontier. Every
file is judged on the other half of the samples, and timed beside the original in turn. For each
pruned model, the table has the one of onnxlr's that is at least as fast and loses least.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

import onnxlr
from models.reference.files import tell_table
from models.zoo.data import write_samples
from models.zoo.models import ZOO, ZooError, ZooModel
from models.zoo.table import markdown as as_markdown
from models.zoo.tasks import set_task
from onnxlr.plan.frontier import Point

COLUMNS = ("model", "pruned", "speed-up", "loss", "onnxlr, as fast: speed-up", "loss")
_CALIBRATION = 32  # samples that pruning looks at: its own default are 8


@dataclass(frozen=True)
class Measured:
    """A file beside its original: how much faster it is, and what it loses."""

    words: str
    speedup: float
    loss: float


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("zoo-cache"),
    help="Folder of the zoo.",
)
@click.option(
    "--only",
    type=click.Choice([model.name for model in ZOO]),
    multiple=True,
    default=("opennsfw", "nudenet"),
    help="Models; may be repeated.",
)
@click.option(
    "--sparsity",
    "sparsities",
    multiple=True,
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=(0.02, 0.05, 0.1, 0.2),
    help="Shares of the channels that are pruned; may be repeated.",
)
@click.option(
    "--max-drop", type=click.FloatRange(min=0), default=0.05, help="Loss up to which onnxlr looks."
)
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
def main(
    cache: Path,
    only: tuple[str, ...],
    sparsities: tuple[float, ...],
    max_drop: float,
    markdown: Path | None,
) -> None:
    """Compare structured pruning by onnxsim with onnxlr at equal measured latency.

    \b
    Example:
      python -m models.zoo.rival --cache zoo-cache --only minilm --markdown rival.md
    """
    rows = []
    for model in ZOO:
        if model.name in only:
            rows += list(_rows(model, cache, sparsities, max_drop))
    tell_table(as_markdown(COLUMNS, rows).splitlines(), markdown)


def _rows(
    model: ZooModel, cache: Path, sparsities: tuple[float, ...], max_drop: float
) -> Iterator[tuple[str, ...]]:
    path = model.fetch(cache)
    files = write_samples(model, path, cache)
    set_task(path, files.judged, files.truth)
    folder = cache / "rival" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    feeds = first_feeds(files.fitted)

    def measured(file: Path, words: str) -> Measured:
        beside = onnxlr.compare(path, file, data=files.judged, metric=model.metric)
        return Measured(words, beside.speed.speedup, beside.quality.drop)

    result = onnxlr.optimize(
        path,
        folder / "out.onnx",
        data=files.fitted,
        validation=files.judged,
        metric=model.metric,
        max_drop=max_drop,
        frontier=folder / "frontier",
    )
    ours = []
    for point in unbeaten(result.report.frontier):
        plan, out = folder / "frontier" / point.file_name, folder / f"ours-{point.file_name}.onnx"
        onnxlr.apply(plan, path, out, data=files.fitted)
        ours.append(measured(out, plan.stem))
    for sparsity in sparsities:
        try:
            rival = measured(pruned(path, feeds, sparsity, folder), f"{sparsity:.0%}")
        except (onnxlr.OnnxlrError, RuntimeError, ValueError) as error:
            yield (model.title, f"{sparsity:.0%}", " ".join(str(error).split())[:80], "", "", "")
            continue
        best = as_fast(ours, rival)
        yield (
            *(model.title, rival.words, f"{rival.speedup:.2f}×", f"{rival.loss:.4f}"),
            *(("none", "") if best is None else (f"{best.speedup:.2f}×", f"{best.loss:.4f}")),
        )


def first_feeds(samples: Path) -> list[dict[str, Any]]:
    """Return some samples, each as the inputs of a run at batch 1."""
    with np.load(samples) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    count = min(_CALIBRATION, *(len(array) for array in content.values()))
    return [{name: array[i : i + 1] for name, array in content.items()} for i in range(count)]


def pruned(path: Path, feeds: list[dict[str, Any]], sparsity: float, folder: Path) -> Path:
    """Write a model with a share of its channels pruned by onnxsim, as it ranks them.

    Raises
    ------
    ZooError
        If onnxsim isn't installed, or too old.
    """
    try:
        prune = importlib.import_module("onnxsim").apply_structured_wanda_pruning
    except (ImportError, AttributeError):
        raise ZooError("the comparison needs onnxsim 0.7 or newer: pip install onnxsim") from None
    out = folder / f"pruned-{sparsity:g}.onnx"
    onnx.save(prune(onnx.load(path), feeds, sparsity=sparsity, global_sparsity=True), out)
    return out


def unbeaten(points: Iterable[Point]) -> list[Point]:
    """The models that none of no more loss is as fast as, by rising loss."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.loss, p.ms or 0.0)):
        if point.ms is not None and (not best or point.ms < (best[-1].ms or 0.0)):
            best.append(point)
    return best


def as_fast(ours: list[Measured], rival: Measured) -> Measured | None:
    """Of the files that are at least as fast as another, the one that loses least."""
    return min((m for m in ours if m.speedup >= rival.speedup), key=lambda m: m.loss, default=None)


if __name__ == "__main__":
    main()
