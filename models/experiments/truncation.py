"""An MLP's hidden layers cut to rank D, before and after training the factors.

``python -m models.experiments.truncation --data-dir DIR --out FOLDER``: 784-1024×5-10 on MNIST,
truncated SVD of every layer but the last (the notebook that the project began with: 98.5% cut to
68 to 75% at D = 10, 94 to 95% at 20, 97 to 97.6% at 30 and 40, 98.1% at 50; 98.0% retrained at 20).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import click
from matplotlib.axes import Axes
from torch import nn

from models.experiments.record import Record, Row, label_accuracy, out_option, quick_option
from models.experiments.runs import CONSOLE, twisted
from models.reference.checkpoint import Recipe, digest, load_network
from models.reference.datasets import DATASETS, Data, load
from models.reference.place import Place, place_options
from models.reference.training import accuracy, train_model
from onnxlr.plan.plan import Plan
from onnxlr.training import factorize_

RANKS = (10, 20, 30, 40, 50)


def cut(network: nn.Module, rank: int) -> Plan:
    """Return a plan that has every hidden layer at a rank."""
    return twisted(network, "svd", rank, 1, exclude="^head$").plan


def measure(
    base: Path, rank: int, recipe: Recipe, data: tuple[Data, Data], epochs: int, place: Place
) -> Row:
    """Measure the accuracy at a rank, before and after training the factors."""
    train, test = data
    _, network = load_network(base)
    plan = cut(network, rank)
    factorize_(network, plan)
    before = accuracy(network, test)
    path = base.with_name(f"retrained-{rank}.pt")
    run = train_model(recipe, train, test, epochs, path, CONSOLE, network, place=place)
    return {
        "D": rank,
        "parameters": sum(p.numel() for p in network.parameters()),
        "truncated": before,
        "retrained": accuracy(run.network, test),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Choice(list(DATASETS)), default="mnist", help="Data set.")
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True), help="Its folder.")
@click.option("--epochs", default=15, help="Of the whole network.")
@click.option("--lr", default=1e-3, help="Learning rate of the whole network.")
@click.option("--retrain-epochs", default=10, help="Of the factors.")
@click.option("--retrain-lr", default=1e-3, help="Learning rate of the factors.")
@click.option("--seed", default=0, help="Of the weights and of the order of the images.")
@place_options
@out_option
@quick_option
def main(
    data: str,
    data_dir: Path | None,
    epochs: int,
    lr: float,
    retrain_epochs: int,
    retrain_lr: float,
    seed: int,
    place: Place,
    out: Path,
    quick: bool,
) -> None:
    """Cut a trained MLP to several ranks, and train the factors."""
    width, ranks = (64, (4, 16)) if quick else (1024, RANKS)
    train, test = load(data, data_dir)
    if quick:
        epochs = retrain_epochs = 1
        place = Place(threads=1)
        train, test = (Data(d.image[:512], d.label[:512]) for d in (train, test))
    base = out / "base.pt"
    recipe = Recipe("mlp", data, width, 128, lr, seed, precision=place.precision)
    whole = train_model(recipe, train, test, epochs, base, CONSOLE, place=place).network
    original, size = accuracy(whole, test), sum(p.numel() for p in whole.parameters())
    settings = {
        "data": data,
        "width": width,
        "epochs": epochs,
        "lr": lr,
        "retrain_epochs": retrain_epochs,
        "retrain_lr": retrain_lr,
        "seed": seed,
        "precision": place.precision,
        "images": len(train.label),
        "test_images": len(test.label),
    }
    record = Record("truncation", out, settings)
    again = replace(recipe, lr=retrain_lr, init=digest(base))
    rows = [
        record.row(
            f"{rank}",
            partial(measure, base, rank, again, (train, test), retrain_epochs, place),
        )
        for rank in ranks
    ]

    def draw(axes: Axes) -> None:
        for key in ("truncated", "retrained"):
            axes.plot([r["D"] for r in rows], [100 * r[key] for r in rows], "o-", label=key)
        label_accuracy(axes, "D", original)

    record.write(
        f"MLP on {data}: hidden layers cut to rank D, and their factors trained",
        {"D": "d", "parameters": ",", "truncated": ".2%", "retrained": ".2%"},
        rows,
        draw,
        [
            f"Original: {original:.2%} of {len(test.label):,} held-out images, {size:,} "
            f"parameters, {epochs} epochs; factors trained for {retrain_epochs}.",
        ],
    )


if __name__ == "__main__":
    main()
