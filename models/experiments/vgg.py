"""A VGG trained on Fashion-MNIST, and what optimizing it for latency gains, without retraining.

``python -m models.experiments.vgg --out FOLDER`` trains the network of seven wide 3x3 convolutions,
and writes ``vgg.onnx``, ``calibration.npz`` (1,024 unlabelled training images), ``validation.npz``
(5,000 labelled test images, which the limit on accuracy is held to) and ``test.npz`` (the other
5,000, which nothing is chosen by). A second run finds the trained model and only measures.
"""

from __future__ import annotations

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

RECIPE = Recipe("vgg", "fashion", width=64, batch_size=128, lr=1e-3, seed=0)
EPOCHS = 6
LIMIT = 0.005
# A drop of 0.5 points among 2,000 images is ten of them: chance would decide.
_CALIBRATION, _VALIDATION = 1024, 5000
_SECONDS = 20.0


def write_samples(train: Data, test: Data, folder: Path) -> Data:
    """Write the three files of samples, and return the test images that nothing is chosen by."""
    rng = np.random.default_rng(0)
    fitted = torch.from_numpy(rng.permutation(len(train.label))[:_CALIBRATION])
    order = torch.from_numpy(rng.permutation(len(test.label)))
    judged, rest = (
        Data(test.image[some], test.label[some])
        for some in (order[:_VALIDATION], order[_VALIDATION:])
    )
    np.savez(folder / "calibration.npz", image=pixels(train.image[fitted]).numpy())
    for name, data in (("validation", judged), ("test", rest)):
        np.savez(folder / f"{name}.npz", image=pixels(data.image).numpy(), label=data.label.numpy())
    return rest


def measure(folder: Path, batch: int, test: Data, rest: Data) -> str:
    """Return one row of the table."""
    before, after = folder / "vgg.onnx", folder / f"vgg-batch-{batch}.onnx"
    result = onnxlr.optimize(
        before,
        after,
        data=folder / "calibration.npz",
        validation=folder / "validation.npz",
        labels="label",
        target="latency",
        max_drop=LIMIT,
        batch=batch,
    )
    benchmark = onnxlr.bench(
        before, after, data=folder / "calibration.npz", batch=batch, seconds=_SECONDS
    )
    speed = benchmark.comparison
    assert speed is not None
    cells = []
    for data in (test, rest):
        a, b = (exported_accuracy(path.read_bytes(), data) for path in (before, after))
        cells.append(f"{a:.2%} → {b:.2%} ({100 * (a - b):.2f})")
    theory = result.report.theoretical_speedup
    methods = ", ".join(f"{name} {count}" for name, count in result.report.methods().items())
    return (
        f"| {batch} | {' | '.join(cells)} | {speed.a.median_ms:.2f} → {speed.b.median_ms:.2f} | "
        f"{speed.speedup:.2f}× ({speed.low:.2f} to {speed.high:.2f}) | {theory:.2f}× | "
        f"{speed.speedup / theory:.2f} | {methods} |"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data-dir", type=click.Path(path_type=Path), default=DATASETS["fashion"].folder)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@click.option("--batch", type=int, multiple=True, default=(1,), help="Images a run; repeatable.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
def main(data_dir: Path, out: Path, batch: tuple[int, ...], markdown: Path | None) -> None:
    """Train the network if it isn't trained yet, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    train, test = load("fashion", data_dir)
    path = out / "vgg.onnx"
    if not path.exists():
        run = train_model(RECIPE, train, test, EPOCHS, path.with_suffix(".pt"), Console())
        export_onnx(run.network, pixels(test.image[:CHECK_IMAGES]), path)
    rest = write_samples(train, test, out)
    lines = [
        "| batch | top-1 of 10,000 (drop, pp) | of the 5,000 that chose nothing | ms "
        "| measured (95%) | theory | realised | methods |",
        "| ---: | --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    for size in batch:
        lines.append(measure(out, size, test, rest))
    tell_table(lines, markdown)


if __name__ == "__main__":
    main()
