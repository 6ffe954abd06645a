"""The MLP of the project's first notebook: onnxlr and plain truncation, without retraining.

``python -m models.experiments.notebook_mlp --data-dir DIR --out FOLDER`` trains 784-1024x5-10 on
MNIST (``mnist-60k.npz`` of the folder, split 50,000 / 10,000) and on Fashion-MNIST. Then it sets
plain truncated SVD, every layer at rank D, beside onnxlr at that number of parameters, fitted to
training images whose labels nothing reads. Accuracy is over the 10,000 images that are held out. A
second run finds the trained models and only measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console

import onnxlr
from models.reference.checkpoint import Recipe
from models.reference.datasets import DATASETS, Data, load, pixels
from models.reference.export import CHECK_IMAGES, export_onnx
from models.reference.files import tell_table
from models.reference.training import exported_accuracy, train_model

RECIPE = Recipe("mlp", "mnist", width=1024, batch_size=128, lr=1e-3, seed=0)
EPOCHS = 15
RANKS = (10, 20, 30, 50)
_FITTED, _JUDGED = 8192, 2048  # training images, without labels


@dataclass(frozen=True)
class Case:
    """A data set, and the accuracy that the project set out for at the size of a rank."""

    name: str
    train: Data
    test: Data
    goals: dict[int, float]


def load_cases(data_dir: Path, fashion_dir: Path) -> Iterator[Case]:
    """Yield MNIST, then Fashion-MNIST."""
    yield Case("mnist", *load("mnist", data_dir), {10: 0.97, 20: 0.982})
    goals = {10: 0.801, 20: 0.85, 30: 0.862, 50: 0.881}
    yield Case("fashion", *load("fashion", fashion_dir), goals)


def write_samples(train: Data, folder: Path) -> tuple[Path, Path]:
    """Write training images to fit to, and others to judge on; neither file has labels."""
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(train.label)))
    fitted, judged, _ = order.tensor_split([_FITTED, _FITTED + _JUDGED])
    paths = folder / "calibration.npz", folder / "validation.npz"
    for path, chosen in zip(paths, (fitted, judged), strict=True):
        np.savez(path, image=pixels(train.image[chosen]).numpy())
    return paths


def measure(case: Case, path: Path, rank: int) -> str:
    """Return one row of the table."""
    plain = onnxlr.optimize(path, method="svd", rank=rank, verify="none")
    size = plain.report.output.params
    data, validation = write_samples(case.train, path.parent)
    # The budget is what the plain one has, to the parameter; which layer gets how much is open.
    ours = onnxlr.optimize(
        path,
        path.with_name(f"{case.name}-rank-{rank}.onnx"),
        data=data,
        validation=validation,
        target=f"params={size / plain.report.input.params!r}",
        max_drop=1,
    )
    assert ours.report.output.params <= size
    whole, cut, fitted = (
        exported_accuracy(content, case.test)
        for content in (
            path.read_bytes(),
            plain.model.SerializeToString(),
            ours.model.SerializeToString(),
        )
    )
    ranks = ", ".join(str(d.rank[0]) if d.rank else "full" for d in ours.plan.decisions)
    goal = f"{case.goals[rank]:.1%}" if rank in case.goals else ""
    return (
        f"| {case.name} | {whole:.2%} | {rank} | {size:,} | {cut:.2%} | {fitted:.2%} | {goal} | "
        f"{ranks} |"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--fashion-dir", type=click.Path(path_type=Path), default=DATASETS["fashion"].folder)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@click.option("--only", default="", help="Data sets whose name contains this.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
def main(data_dir: Path, fashion_dir: Path, out: Path, only: str, markdown: Path | None) -> None:
    """Train what isn't trained yet, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| data | original | D | parameters | plain SVD | onnxlr | asked for | ranks |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for case in load_cases(data_dir, fashion_dir):
        if only not in case.name:
            continue
        path = out / f"{case.name}.onnx"
        if not path.exists():
            recipe, checkpoint = replace(RECIPE, data=case.name), path.with_suffix(".pt")
            run = train_model(recipe, case.train, case.test, EPOCHS, checkpoint, Console())
            export_onnx(run.network, pixels(case.test.image[:CHECK_IMAGES]), path)
        for rank in RANKS:
            lines.append(measure(case, path, rank))
        tell_table(lines, markdown)


if __name__ == "__main__":
    main()
