"""Writes the sample of test images that the examples and tests read: fashion-samples.npz."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from models.fashion import DEFAULT_DATA_DIR, load_split


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--count", type=click.IntRange(1, 10_000), default=600, help="Images to choose.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the choice.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=DEFAULT_DATA_DIR,
    help="Folder with the Fashion-MNIST IDX files.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("models/fashion-samples.npz"),
    help="File to write.",
)
def main(count: int, seed: int, data_dir: Path, out: Path) -> None:
    """Write a seeded choice of Fashion-MNIST test images to one .npz file.

    It holds `image`, float32 in 0..1 of shape (count, 1, 28, 28), and `label`, int64 of shape
    (count,).

    \b
    Example:
      python -m models.samples --count 600 --out models/fashion-samples.npz
    """
    test = load_split(data_dir, "test")
    chosen = np.random.default_rng(seed).choice(len(test.label), size=count, replace=False)
    image = (test.image[chosen, np.newaxis] / np.float32(255)).astype(np.float32)
    label = test.label[chosen].astype(np.int64)
    np.savez_compressed(out, image=image, label=label)
    click.echo(f"{out}: {count} images, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
