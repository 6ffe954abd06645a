"""The state of a training run, and the file it's saved to and resumed from."""

from __future__ import annotations

import io
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import nn

from models.files import replace_file
from models.networks import Cnn, Mlp, Vgg

NETWORKS: dict[str, type[Mlp | Cnn | Vgg]] = {"mlp": Mlp, "cnn": Cnn, "vgg": Vgg}


class CheckpointError(click.ClickException):
    """A checkpoint can't be read, or belongs to another run; the message gives the remedy."""


@dataclass(frozen=True)
class Recipe:
    """What a run can't change half-way. The number of epochs isn't here: it may be raised."""

    network: str
    width: int
    batch_size: int
    lr: float
    seed: int


@dataclass
class Run:
    """All that the next epoch depends on; two runs with equal state train alike."""

    recipe: Recipe
    network: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    """Draws the order of the images and the flips."""
    epoch: int
    """Epochs done."""


def new_run(recipe: Recipe) -> Run:
    """A run at epoch 0, with weights and image order drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    network = NETWORKS[recipe.network](width=recipe.width)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
    generator = torch.Generator().manual_seed(recipe.seed)
    return Run(recipe, network, optimizer, generator, epoch=0)


def save_run(run: Run, path: Path) -> None:
    """Write the run to `path` in one step."""
    buffer = io.BytesIO()
    state = {
        "recipe": asdict(run.recipe),
        "network": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "epoch": run.epoch,
    }
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def load_run(recipe: Recipe, path: Path) -> Run:
    """Read back the run that save_run wrote to `path`.

    Raises CheckpointError when the file isn't a checkpoint or was made by another recipe.
    """
    try:
        state = torch.load(path, weights_only=True)
        found = Recipe(**state["recipe"])
        if found != recipe:
            raise _other_recipe(path, asdict(found), asdict(recipe))
        run = new_run(recipe)
        run.network.load_state_dict(state["network"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.generator.set_state(state["generator"])
        run.epoch = state["epoch"]
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} can't be read as a checkpoint ({type(error).__name__}); "
            "delete it or give another --checkpoint."
        ) from error
    return run


def _other_recipe(
    path: Path, found: dict[str, str | float], wanted: dict[str, str | float]
) -> CheckpointError:
    changes = ", ".join(
        f"{name} {value} (now {wanted[name]})"
        for name, value in found.items()
        if value != wanted[name]
    )
    return CheckpointError(
        f"{path} was made with {changes}; use the same settings, delete it, or give another "
        "--checkpoint."
    )
