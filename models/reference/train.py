"""Command line that trains a network on a data set, resumably."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from models.reference.checkpoint import Recipe, Twist, digest, load_weights, make_network
from models.reference.datasets import DATASETS, load
from models.reference.networks import NETWORKS
from models.reference.place import Place, place_options
from models.reference.training import SCHEDULES, stopping, train_model

# Weights leave float32 far below; Adam can't even compute with 1e39.
_MOST_LR = 1e6


def _shown(name: str) -> str:
    """Return the defaults of one option, for its help text."""
    return ", ".join(f"{network} {getattr(of, name)}" for network, of in NETWORKS.items())


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("network", type=click.Choice(list(NETWORKS)))
@click.option("--data", type=click.Choice(list(DATASETS)), required=True, help="Data set.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    show_default="fashion: that of the Debian package",
    help="Folder with the data set.",
)
@click.option(
    "--width",
    type=click.IntRange(min=1),
    show_default=_shown("width"),
    help="Units of a hidden layer (mlp), channels of the first convolution (all others).",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), show_default=_shown("epochs"), help="Epochs in all."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, help="Images a step.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True, max=_MOST_LR),
    show_default=_shown("lr"),
    help="Learning rate at the start.",
)
@click.option(
    "--schedule",
    type=click.Choice(list(SCHEDULES)),
    default="half-cosine",
    help="How it falls: to 0, or to a tenth after a half and after three quarters.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    help="Seed of the weights, the order, flips and shifts.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="DATA-NETWORK-WIDTH.pt",
    help="Written every few minutes and after each epoch; resumed from if it exists.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Weights to begin with: an .npz of arrays named as in the state_dict, or a checkpoint.",
)
@click.option(
    "--twist", metavar="METHOD", help="Train with DeepTwist by this method, such as tucker2."
)
@click.option(
    "--rank", show_default="0.25", help="Of DeepTwist: a rank as `onnxlr optimize --rank` takes it."
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    show_default="200",
    help="Of DeepTwist: steps from one distortion to the next.",
)
@click.option(
    "--metric",
    type=click.Choice(["weight", "data"]),
    show_default="weight",
    help="Of DeepTwist: what a distortion loses least of, the weight or the layer's output.",
)
@click.option(
    "--factors",
    type=click.FloatRange(0, 1, max_open=True),
    show_default="0",
    help="Of DeepTwist: the last share of the steps, in which the factors themselves are trained.",
)
@place_options
def main(
    network: str,
    data: str,
    data_dir: Path | None,
    width: int | None,
    epochs: int | None,
    batch_size: int,
    lr: float | None,
    schedule: str,
    seed: int,
    checkpoint: Path | None,
    init: Path | None,
    twist: str | None,
    rank: str | None,
    every: int | None,
    metric: str | None,
    factors: float | None,
    place: Place,
) -> None:
    """Train NETWORK on a data set; `models.reference.export` makes an ONNX file of it.

    mlp has five hidden layers of WIDTH; cnn has five 3x3 convolutions of WIDTH to 4 x WIDTH
    channels, vgg seven; lenet is the tutorials' with two 5x5 convolutions; resnet20, 32 and 56 are
    the CIFAR networks of He et al. 2015. Ctrl-C stops a run; the same command goes on from its
    checkpoint.

    \b
    Example:
      python -m models.reference.train mlp --data fashion --width 384
    """
    kind = NETWORKS[network]
    width = width or kind.width
    checkpoint = checkpoint or Path(f"{data}-{network}-{width}.pt")
    if twist is None and (rank, every, metric, factors) != (None,) * 4:
        raise click.UsageError(
            "--rank, --every, --metric and --factors are DeepTwist's: name a method with --twist."
        )
    recipe = Recipe(
        network,
        data,
        width,
        batch_size,
        lr or kind.lr,
        seed,
        "" if init is None else digest(init),
        None if twist is None else Twist(twist, rank or "0.25", every or 200, metric or "weight"),
        schedule,
        place.precision,
        factors or 0.0,
    )
    built = make_network(recipe)
    if init is not None:
        load_weights(built, init)
    console = Console(highlight=False, soft_wrap=True)
    with stopping(checkpoint, console):
        train, test = load(data, data_dir)
    train_model(recipe, train, test, epochs or kind.epochs, checkpoint, console, built, place=place)


if __name__ == "__main__":
    main()
