"""Training runs that experiments share: a CIFAR ResNet, pre-trained, then trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from torch import nn

from models.reference.checkpoint import (
    Recipe,
    Run,
    digest,
    load_network,
    load_weights,
    make_network,
)
from models.reference.datasets import Data, load
from models.reference.place import Place, place_options
from models.reference.training import SCHEDULES, train_model
from onnxlr.errors import OnnxlrError
from onnxlr.training import DeepTwist

CONSOLE = Console(highlight=False, soft_wrap=True)
Made = tuple[nn.Module, DeepTwist | None]


@dataclass(frozen=True)
class Schedule:
    """The settings that all runs of an experiment have in common."""

    network: str
    width: int
    base_epochs: int
    base_lr: float
    epochs: int
    lr: float
    batch_size: int
    every: int
    """S_D, steps from one distortion to the next."""
    schedule: str
    """How the learning rate of each run falls; one of SCHEDULES."""
    images: int | None
    """Of the training images, the first so many; all if None."""


_QUICK = Schedule(
    network="resnet20",
    width=8,
    base_epochs=1,
    base_lr=0.01,
    epochs=1,
    lr=0.02,
    batch_size=64,
    every=2,
    schedule="half-cosine",
    images=256,
)


@dataclass(frozen=True)
class Bench:
    """Data, pre-trained weights, and where runs are kept."""

    schedule: Schedule
    folder: Path
    init: str
    """Digest of the weights that training began with; empty if they were drawn."""
    train: Data
    test: Data
    place: Place

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a row depends on, the same for all runs."""
        return {
            **asdict(self.schedule),
            "init": self.init,
            "precision": self.place.precision,
            "test_images": len(self.test.label),
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return -(-len(self.train.label) // self.schedule.batch_size) * self.schedule.epochs

    @property
    def base(self) -> Path:
        """The checkpoint of the network that all runs start from."""
        return self.folder / "base.pt"

    def pretrained(self) -> nn.Module:
        """Return a fresh copy of the network that all runs start from."""
        return load_network(self.base)[1]

    def pretrain(self, init: Path | None) -> None:
        """Train it, as far as it isn't."""
        s = self.schedule
        recipe = replace(self._recipe, lr=s.base_lr, init=self.init)
        network = make_network(recipe)
        if init is not None:
            load_weights(network, init)
        self._trained(recipe, s.base_epochs, self.base, network, None)

    def run(
        self, name: str, seed: int, make: Callable[[nn.Module], Made], factors: float = 0.0
    ) -> Run:
        """Train what `make` makes of the pre-trained network; its checkpoint resumes.

        `make` gives the network to train, and the DeepTwist that goes with it if one does: for the
        last share `factors` of the steps what it ends at is trained as factors.
        """
        s = self.schedule
        network, twist = make(self.pretrained())
        recipe = replace(
            self._recipe,
            seed=seed,
            init=digest(self.base),
            schedule=s.schedule,
            factors=factors,
        )
        CONSOLE.print(f"{name}, seed {seed}: {s.epochs} epochs")
        path = self.folder / "runs" / f"{name}-{seed}.pt"
        return self._trained(recipe, s.epochs, path, network, twist)

    @property
    def _recipe(self) -> Recipe:
        s = self.schedule
        place = self.place
        return Recipe(
            *(s.network, "cifar10", s.width, s.batch_size, s.lr, 0), precision=place.precision
        )

    def _trained(
        self,
        recipe: Recipe,
        epochs: int,
        path: Path,
        network: nn.Module,
        twist: DeepTwist | None,
    ) -> Run:
        data, place = (self.train, self.test), self.place
        return train_model(recipe, *data, epochs, path, CONSOLE, network, twist, place=place)


def schedule_options() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options that ``make_bench`` takes."""
    options: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path, exists=True),
            required=True,
            help="Folder with CIFAR-10.",
        ),
        click.option(
            "--init",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Trained weights to begin with (.npz or a checkpoint); drawn otherwise.",
        ),
        click.option("--network", default="resnet32", help="As models.reference.train names it."),
        click.option("--base-epochs", default=3, help="Of the network that all runs start from."),
        click.option("--base-lr", default=0.01, help="Learning rate of those."),
        click.option("--epochs", default=2, help="Of each run after it."),
        click.option("--lr", default=0.02, help="Learning rate of each run at its start."),
        click.option("--batch-size", default=128, help="Images a step."),
        click.option(
            "--schedule",
            type=click.Choice(list(SCHEDULES)),
            default="half-cosine",
            help="How it falls: to 0, or to a tenth after a half and after three quarters.",
        ),
        click.option(
            *("--distort-every", "--every", "every"),
            type=click.IntRange(min=1),
            default=200,
            help="S_D, steps between distortions.",
        ),
        click.option(
            "--seed",
            "seeds",
            type=int,
            multiple=True,
            default=(0, 1),
            help="Of the order of the images and their augmentation; repeatable.",
        ),
        place_options,
    ]

    def added(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return added


def make_bench(
    out: Path,
    quick: bool,
    data_dir: Path,
    init: Path | None,
    network: str,
    base_epochs: int,
    base_lr: float,
    epochs: int,
    lr: float,
    batch_size: int,
    every: int,
    schedule: str,
    place: Place,
) -> Bench:
    """Return the bench for these options; a quick one is small whatever else they say."""
    settings = Schedule(
        *(network, 16, base_epochs, base_lr, epochs, lr, batch_size, every, schedule, None)
    )
    if quick:
        settings, init, place = _QUICK, None, Place(threads=1)
    train, test = load("cifar10", data_dir)
    if settings.images is not None:
        some = slice(settings.images)
        train, test = (Data(d.image[some], d.label[some]) for d in (train, test))
    bench = Bench(settings, out, "" if init is None else digest(init), train, test, place)
    bench.pretrain(init)
    return bench


def twisted(network: nn.Module, method: str, rank: Any, every: int, **where: Any) -> DeepTwist:
    """Return a DeepTwist; a refusal by it becomes an error of the command."""
    try:
        return DeepTwist(network, method, rank, every, **where)
    except OnnxlrError as error:
        raise click.UsageError(str(error)) from error
