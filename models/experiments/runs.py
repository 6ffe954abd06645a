"""Training runs that experiments share: a CIFAR ResNet, pre-trained, then trained on to low rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from torch import nn

from models.checkpoint import Recipe, digest, load_network, load_weights, make_network
from models.datasets import Data, load
from models.train import THREADS, train_model
from onnxlr.errors import OnnxlrError
from onnxlr.training import DeepTwist

_QUICK_IMAGES = 256
Made = tuple[nn.Module, DeepTwist | None]


@dataclass(frozen=True)
class Schedule:
    """What all runs of an experiment have in common."""

    network: str
    width: int
    base_epochs: int
    base_lr: float
    epochs: int
    lr: float
    batch_size: int
    every: int
    """S_D, steps from one distortion to the next."""
    images: int | None
    """Of the training images, the first so many; all if None."""


QUICK = {
    "network": "resnet20",
    "width": 8,
    "base_epochs": 1,
    "epochs": 1,
    "batch_size": 64,
    "every": 2,
    "images": _QUICK_IMAGES,
}


@dataclass(frozen=True)
class Bench:
    """Data, pre-trained weights, and where runs are kept."""

    schedule: Schedule
    folder: Path
    init: Path | None
    train: Data
    test: Data
    threads: int
    console: Console

    @property
    def settings(self) -> dict[str, Any]:
        """What a row depends on, all runs alike."""
        init = "" if self.init is None else digest(self.init)
        return {**asdict(self.schedule), "init": init, "test_images": len(self.test.label)}

    def base(self) -> Path:
        """The checkpoint of the network that all runs start from, trained if it isn't there."""
        s, path = self.schedule, self.folder / "base.pt"
        init = "" if self.init is None else digest(self.init)
        recipe = Recipe(s.network, "cifar10", s.width, s.batch_size, s.base_lr, 0, init)
        network = None
        if self.init is not None:
            network = make_network(recipe)
            load_weights(network, self.init)
        train_model(
            recipe,
            self.train,
            self.test,
            s.base_epochs,
            path,
            self.console,
            network,
            threads=self.threads,
        )
        return path

    def run(self, name: str, seed: int, make: Callable[[nn.Module], Made]) -> nn.Module:
        """Train what `make` makes of the pre-trained network; its checkpoint resumes.

        `make` gives the network to train, and the DeepTwist that goes with it if one does.
        """
        s, base = self.schedule, self.base()
        _, pretrained = load_network(base)
        network, twist = make(pretrained)
        recipe = Recipe(s.network, "cifar10", s.width, s.batch_size, s.lr, seed, digest(base))
        path = self.folder / "runs" / f"{name}-{seed}.pt"
        self.console.print(f"{name}, seed {seed}: {s.epochs} epochs")
        done = train_model(
            recipe,
            self.train,
            self.test,
            s.epochs,
            path,
            self.console,
            network,
            twist,
            threads=self.threads,
        )
        return done.network


def schedule_options() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a Schedule and of a Bench; ``make_bench`` takes what they give."""
    options = [
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
        click.option("--network", default="resnet32", help="As models.train names it."),
        click.option("--base-epochs", default=3, help="Of the network that all runs start from."),
        click.option("--base-lr", default=0.01, help="Learning rate of those."),
        click.option("--epochs", default=2, help="Of each run after it."),
        click.option("--lr", default=0.02, help="Learning rate of each run at its start."),
        click.option("--batch-size", default=128, help="Images a step."),
        click.option("--every", default=200, help="S_D, steps between distortions."),
        click.option(
            "--seed",
            "seeds",
            type=int,
            multiple=True,
            default=(0, 1),
            help="Of the order of the images and their augmentation; repeatable.",
        ),
        click.option("--threads", default=THREADS, help="Threads of PyTorch."),
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
    threads: int,
) -> Bench:
    """The bench that options ask for; a quick one is small whatever else they say."""
    schedule = Schedule(network, 16, base_epochs, base_lr, epochs, lr, batch_size, every, None)
    if quick:
        schedule, init, threads = replace(schedule, **QUICK), None, 1
    train, test = load("cifar10", data_dir)
    if schedule.images is not None:
        train, test = (
            Data(d.image[: schedule.images], d.label[: schedule.images]) for d in (train, test)
        )
    return Bench(
        schedule, out, init, train, test, threads, Console(highlight=False, soft_wrap=True)
    )


def twisted(network: nn.Module, method: str, rank: Any, every: int, **where: Any) -> DeepTwist:
    """A DeepTwist, whose refusal is an error of the command."""
    try:
        return DeepTwist(network, method, rank, every, **where)
    except OnnxlrError as error:
        raise click.UsageError(str(error)) from error
