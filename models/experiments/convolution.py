"""A small CIFAR network with conv1 as slices of rank 1 and conv2 as a CP, class by class.

``python -m models.experiments.convolution --data-dir DIR --out FOLDER``: slice-wise SVD of the
first convolution and CP of the second at the rank that EVBMF finds, each alone and both, before and
after training on. The whole network is trained on for as long, for a fair comparison.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import click
from matplotlib.axes import Axes

from models.experiments.record import Record, Row, out_option, quick_option
from models.experiments.runs import CONSOLE, twisted
from models.reference.checkpoint import Recipe, digest, load_network
from models.reference.datasets import DATASETS, Data, load
from models.reference.place import Place, place_options
from models.reference.training import accuracy, class_accuracy, train_model
from onnxlr.plan.plan import Decision, Plan
from onnxlr.training import factorize_

# Which layer and by which method.
_METHODS = {"conv1": "slice-svd", "conv2": "cp"}
VARIANTS = {
    "original": (),
    "conv1 by slices": ("conv1",),
    "conv2 by CP": ("conv2",),
    "both": ("conv1", "conv2"),
}


def decisions(base: Path, variant: str, ranks: dict[str, int | str]) -> tuple[Decision, ...]:
    """Return the decisions on the layers that a variant replaces."""
    _, network = load_network(base)
    layers: tuple[str, ...] = VARIANTS[variant]
    return tuple(
        decision
        for name in layers
        for decision in twisted(
            network, _METHODS[name], ranks[name], 1, include=f"^{name}$"
        ).plan.replaced
    )


def measure(
    base: Path,
    name: str,
    ranks: dict[str, int | str],
    recipe: Recipe,
    data: tuple[Data, Data],
    epochs: int,
    place: Place,
) -> Row:
    """Measure the accuracy of a variant, in all and by class, before and after training on."""
    train, test = data
    _, network = load_network(base)
    chosen = decisions(base, name, ranks)
    factorize_(network, Plan("", chosen))
    spec = DATASETS[recipe.data]
    row: Row = {
        "variant": name,
        "ranks": ", ".join(f"{d.decision} {','.join(map(str, d.rank or ()))}" for d in chosen),
        "parameters": sum(p.numel() for p in network.parameters()),
        "kernels": sum(p.numel() for p in network.parameters() if p.ndim == 4),
        "before": accuracy(network, test),
        "before_by_class": class_accuracy(network, test, len(spec.classes)),
    }
    path = base.with_name(f"{name.replace(' ', '-')}.pt")
    run = train_model(recipe, train, test, epochs, path, CONSOLE, network, place=place)
    return row | {
        "after": accuracy(run.network, test),
        "after_by_class": class_accuracy(run.network, test, len(spec.classes)),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--data-dir", type=click.Path(path_type=Path, exists=True), required=True, help="With CIFAR-10."
)
@click.option("--epochs", default=15, help="Of the whole network.")
@click.option("--lr", default=1e-3, help="Learning rate of the whole network.")
@click.option("--tune-epochs", default=4, help="Of each variant after it.")
@click.option("--tune-lr", default=3e-4, help="Learning rate of the variants.")
@click.option("--seed", default=0, help="Of the weights and of the order of the images.")
@place_options
@out_option
@quick_option
def main(
    data_dir: Path,
    epochs: int,
    lr: float,
    tune_epochs: int,
    tune_lr: float,
    seed: int,
    place: Place,
    out: Path,
    quick: bool,
) -> None:
    """Factorize the convolutions of a small network, and train on."""
    train, test = load("cifar10", data_dir)
    ranks: dict[str, int | str] = {"conv1": 1, "conv2": "evbmf"}
    if quick:
        ranks["conv2"] = 8  # EVBMF finds nothing but noise in weights that hardly trained
        epochs = tune_epochs = 1
        place = Place(threads=1)
        train, test = (Data(d.image[:512], d.label[:512]) for d in (train, test))
    base = out / "base.pt"
    recipe = Recipe("lenet", "cifar10", 6, 128, lr, seed, precision=place.precision)
    train_model(recipe, train, test, epochs, base, CONSOLE, place=place)
    settings = {
        "epochs": epochs,
        "lr": lr,
        "tune_epochs": tune_epochs,
        "tune_lr": tune_lr,
        "seed": seed,
        "precision": place.precision,
        "images": len(train.label),
        "test_images": len(test.label),
    }
    record = Record("convolution", out, settings)
    again = replace(recipe, lr=tune_lr, init=digest(base))
    measured = [
        record.row(
            name.replace(" ", "-"),
            partial(measure, base, name, ranks, again, (train, test), tune_epochs, place),
        )
        for name in VARIANTS
    ]
    classes = DATASETS["cifar10"].classes
    rows = [
        {**row, "trained_on": words, "accuracy": row[when]}
        | dict(zip(classes, row[f"{when}_by_class"], strict=True))
        for row in measured
        for when, words in (("before", "no"), ("after", f"{tune_epochs} epochs"))
    ]

    def draw(axes: Axes) -> None:
        width = 0.8 / len(rows)
        for i, row in enumerate(rows):
            places = [c + i * width for c in range(len(classes))]
            label = row["variant"] + ("" if row["trained_on"] == "no" else ", trained on")
            axes.bar(places, [100 * row[c] for c in classes], width, label=label)
        axes.set_xticks(range(len(classes)), classes, rotation=45, fontsize=8)
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 110)  # room for the legend
        axes.legend(fontsize=6, ncols=4, loc="upper center")

    record.write(
        "A small CIFAR-10 network: conv1 by slices, conv2 by CP",
        {
            "variant": "",
            "ranks": "",
            "kernels": ",",
            "trained_on": "",
            "accuracy": ".2%",
            **dict.fromkeys(classes, ".1%"),
        },
        rows,
        draw,
        [f"kernels: elements of all convolutions; accuracy on {len(test.label):,} test images."],
    )


if __name__ == "__main__":
    main()
