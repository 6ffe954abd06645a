"""Writes the sample of test images that the examples and tests read: fashion-samples.npz."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from models.reference.datasets import DATASETS, load, pixels


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--count", type=click.IntRange(min=1), default=5000, help="Images to choose.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the choice.")
@click.option("--rest", is_flag=True, help="Write the test images that are not chosen.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=DATASETS["fashion"].folder,
    help="Folder with the Fashion-MNIST IDX files.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("models/fashion-samples.npz"),
    help="File to write.",
)
def main(count: int, seed: int, rest: bool, data_dir: Path, out: Path) -> None:
    """Write a seeded choice of Fashion-MNIST test images to one .npz file.

    It holds `image`, float32 in 0..1 of shape (count, 1, 28, 28), and `label`, int64 of shape
    (count,). No network was trained on test images; those that are not chosen are fresh to
    whatever was done with the file.

    \b
    Examples:
      python -m models.reference.samples --count 5000 --out models/fashion-samples.npz
      python -m models.reference.samples --rest --out fresh.npz
    """
    _, test = load("fashion", data_dir)
    if count > len(test.label):
        raise click.BadParameter(f"{count} of {len(test.label)} test images; ask for fewer.")
    chosen = np.random.default_rng(seed).choice(len(test.label), size=count, replace=False)
    if rest:
        chosen = np.setdiff1d(np.arange(len(test.label)), chosen)
    image, label = pixels(test.image[chosen]), test.label[chosen]
    _write(out, image=image.numpy(), label=label.numpy())
    click.echo(f"{out}: {len(label)} images, {out.stat().st_size:,} bytes")


def _write(path: Path, **arrays: NDArray[Any]) -> None:
    """Write a .npz file in the method of compression that takes a third off NumPy's own."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            # Not the time of writing: the same samples make the same file.
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_BZIP2
            archive.writestr(entry, content.getvalue())


if __name__ == "__main__":
    main()
