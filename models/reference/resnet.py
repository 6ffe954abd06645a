"""The command that exports a trained CIFAR ResNet-32 and its data for the experiments.

``python -m models.reference.resnet --data-dir DIR --out FOLDER`` reads
``resnet32-cifar10-weights.npz`` and ``cifar10-exact-subset.npz`` from a folder, and writes
``resnet32.onnx``, ``calibration.npz`` (1,024 unlabelled training images) and ``test.npz`` (the
labelled test images) for the experiments.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from models.reference.checkpoint import load_weights
from models.reference.datasets import DATASETS, Data, pixels, to_data
from models.reference.export import export_onnx
from models.reference.files import read_arrays
from models.reference.networks import ResNet
from models.reference.training import accuracy

# Those of ImageNet: the published weights were trained with them.
_TRAINED_ON = replace(DATASETS["cifar10"], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_REMEDY = "point --data-dir at the folder that holds it"
CALIBRATION_IMAGES = 1024


def load_trained(data_dir: Path) -> ResNet:
    """Return the ResNet-32 whose weights lie in a folder, in eval mode."""
    network = ResNet(_TRAINED_ON, depth=32)
    load_weights(network, data_dir / "resnet32-cifar10-weights.npz")
    network.eval()
    return network


def load_exact(data_dir: Path) -> tuple[Data, Data]:
    """Return training and test images of CIFAR-10, a part of the original ones."""
    path = data_dir / "cifar10-exact-subset.npz"
    arrays = read_arrays(path, _REMEDY, ("train_x", "train_y", "test_x", "test_y"))
    train, test = (
        to_data(
            arrays[f"{part}_x"].transpose(0, 3, 1, 2),  # (n, 32, 32, 3) -> (n, 3, 32, 32)
            arrays[f"{part}_y"],
        )
        for part in ("train", "test")
    )
    return train, test


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
def main(data_dir: Path, out: Path) -> None:
    """Export the trained network and its data."""
    out.mkdir(parents=True, exist_ok=True)
    network = load_trained(data_dir)
    train, test = load_exact(data_dir)
    order = np.random.default_rng(0).permutation(len(train.label))
    chosen = np.sort(order[:CALIBRATION_IMAGES])
    difference = export_onnx(network, pixels(test.image[:16]), out / "resnet32.onnx")
    np.savez(out / "calibration.npz", image=pixels(train.image[chosen]).numpy())
    np.savez(out / "test.npz", image=pixels(test.image).numpy(), label=test.label.numpy())
    click.echo(
        f"exported to {difference:.1e}; top-1 {accuracy(network, test):.2%} on "
        f"{len(test.label)} test images"
    )


if __name__ == "__main__":
    main()
