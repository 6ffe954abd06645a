"""The state of a training run, and the file it's saved to and resumed from."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from models.reference.datasets import DATASETS
from models.reference.files import read_arrays, replace_file
from models.reference.networks import NETWORKS
from onnxlr.errors import OnnxlrError
from onnxlr.training import DeepTwist, factorize_

_MOMENTUM, _WEIGHT_DECAY = 0.9, 5e-4
_PROGRESS = ("epoch", "step", "order", "loss", "factorized", "seconds")  # attributes of a Run
# How many names or settings an error gives before it counts the rest.
_SHOWN = 3


class CheckpointError(click.ClickException):
    """A checkpoint can't be read, or belongs to another run; the message gives the remedy."""


@dataclass(frozen=True)
class Twist:
    """Settings of a DeepTwist."""

    method: str
    rank: str
    every: int
    metric: str = "weight"


@dataclass(frozen=True)
class Recipe:
    """The settings that a run can't change half-way. The number of epochs may be raised."""

    network: str
    data: str
    width: int
    batch_size: int
    lr: float
    seed: int
    init: str = ""
    """Digest of the file that the weights began with; empty if they were drawn."""
    twist: Twist | None = None
    schedule: str = "half-cosine"
    """How the learning rate falls; one of SCHEDULES."""
    precision: str = "float32"
    """What products are computed in: float32 or bfloat16."""
    factors: float = 0.0
    """For which last share of the steps a twisted network is trained as factors."""


@dataclass
class Run:
    """All that the next epoch depends on; two runs with equal state train alike."""

    recipe: Recipe
    network: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    """Draws the order of the images, their flips and shifts."""
    twist: DeepTwist | None = None
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps of the next epoch that are done already."""
    order: Tensor | None = None
    """In which the images of a begun epoch come, (n,)."""
    loss: float = 0.0
    """Of the images of a begun epoch together, in nats."""
    factorized: bool = False
    """Whether the network is one of factors by now; its twist then tells of which."""
    seconds: float = 0.0
    """Wall time of the training so far; all else is the same in runs that train alike."""


def make_network(recipe: Recipe) -> nn.Module:
    """Return the recipe's network, with weights drawn from its seed."""
    torch.manual_seed(recipe.seed)
    return NETWORKS[recipe.network].build(DATASETS[recipe.data], recipe.width)


def new_run(
    recipe: Recipe,
    network: nn.Module | None = None,
    twist: DeepTwist | None = None,
    device: str = "cpu",
) -> Run:
    """Return a run at epoch 0; weights, order and augmentation are drawn from the recipe's seed.

    A `network` is trained as it is, in place of the recipe's; so is a `twist` of it. What is
    random is drawn on the CPU whatever the `device`, so that both see the same images.
    Raises click.UsageError when the recipe's twist makes no sense for the network.
    """
    kind = NETWORKS[recipe.network]
    network = make_network(recipe) if network is None else network
    torch.manual_seed(recipe.seed)  # a network may draw more as it trains: dropout does
    network = network.to(device)
    if kind.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if twist is None and recipe.twist is not None:
        try:
            twist = DeepTwist(network, **asdict(recipe.twist))
        except OnnxlrError as error:
            raise click.UsageError(f"--twist: {error}") from error
    parameters = network.parameters()
    optimizer = (
        torch.optim.SGD(
            parameters, recipe.lr, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY, nesterov=True
        )
        if kind.sgd
        else torch.optim.Adam(parameters, lr=recipe.lr)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    return Run(recipe, network, optimizer, generator, twist)


def to_factors(run: Run) -> None:
    """Factorize a twisted network without loss; its optimizer goes on with the factors."""
    assert run.twist is not None
    factorize_(run.network, run.twist.plan, optimizer=run.optimizer)
    if NETWORKS[run.recipe.network].channels_last:
        run.network.to(memory_format=torch.channels_last)
    run.factorized = True


def save_run(run: Run, path: Path) -> None:
    """Write the run to `path` in one step."""
    buffer = io.BytesIO()
    state = {
        "recipe": asdict(run.recipe),
        "network": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "global_generator": torch.get_rng_state(),
        "twist": run.twist and run.twist.state_dict(),
        **{name: getattr(run, name) for name in _PROGRESS},
    }
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def load_run(
    recipe: Recipe,
    path: Path,
    network: nn.Module | None = None,
    twist: DeepTwist | None = None,
    device: str = "cpu",
) -> Run:
    """Read back the run that save_run wrote to `path`, into `network` and `twist` if there are any.

    Raises CheckpointError when the file isn't a checkpoint or was made by another recipe.
    """
    saved, state = _read_state(path)
    if saved != recipe:
        raise _other_recipe(path, _flat(saved), _flat(recipe))
    run = new_run(recipe, network, twist, device)
    try:
        if run.twist is not None:
            run.twist.load_state_dict(state["twist"])
        if state.get("factorized"):
            to_factors(run)
    except (*_UNREADABLE, OnnxlrError) as error:
        raise _unreadable(path, error) from error
    _fill(run.network, state["network"], path)
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        run.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_generator"])
        for name in _PROGRESS:
            setattr(run, name, state.get(name, getattr(run, name)))
    except (*_UNREADABLE, OnnxlrError) as error:
        raise _unreadable(path, error) from error
    return run


def load_network(path: Path) -> tuple[Recipe, nn.Module]:
    """Return the network of a checkpoint, built from its recipe.

    Raises CheckpointError when the file isn't a checkpoint, or one of a network that its program
    built by itself.
    """
    recipe, state = _read_state(path)
    network = make_network(recipe)
    _fill(network, state["network"], path)
    return recipe, network


def load_weights(network: nn.Module, path: Path) -> None:
    """Set a network's weights from named arrays (.npz) or from a checkpoint.

    Raises CheckpointError when they don't fit, FileError when the file can't be read.
    """
    if path.suffix == ".npz":
        arrays = read_arrays(path, "give an .npz file of arrays named as in the state_dict")
        numeric = {n: torch.from_numpy(a) for n, a in arrays.items() if a.dtype.kind in "iuf"}
        _fill(network, numeric, path)
    else:
        _fill(network, _read_state(path)[1]["network"], path)


def digest(path: Path) -> str:
    """Return the digest of a file, by which a recipe names the weights that a run began with."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# What torch.load and a foreign state's parts raise.
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError),
    *(TypeError, KeyError, ValueError, IndexError, AttributeError),
)


def _read_state(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a checkpoint and the whole state in its file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = dict(state["recipe"])
        twist = settings.pop("twist")
        recipe = Recipe(**settings, twist=twist and Twist(**twist))
        supported = recipe.network in NETWORKS and recipe.data in DATASETS
        if not supported or not isinstance(state["network"], Mapping):
            raise KeyError(recipe.network)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return recipe, state


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} can't be read as a checkpoint ({type(error).__name__}); "
        "delete it or name another file."
    )


def _fill(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Set all weights of a network from those of a file, by name."""
    parameters = network.state_dict()
    # Files from elsewhere may lack the count of batches, which nothing here reads.
    lost = [n for n in parameters.keys() - weights.keys() if not n.endswith("num_batches_tracked")]
    wrong = [
        *(f"{name} is missing" for name in sorted(lost)),
        *(f"{name} is of another network" for name in sorted(weights.keys() - parameters.keys())),
        *(
            f"{name} has shape {tuple(weight.shape)}, not {tuple(parameters[name].shape)}"
            for name, weight in weights.items()
            if name in parameters and weight.shape != parameters[name].shape
        ),
    ]
    if wrong:
        rest = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            f"the weights in {path} don't fit this network: {', '.join(wrong[:_SHOWN])}{rest}; "
            "name the file of a network of this kind, width and data set."
        )
    network.load_state_dict(weights, strict=False)


def _flat(recipe: Recipe) -> dict[str, object]:
    """Return the settings of a recipe in the words of the command line."""
    settings: dict[str, Any] = asdict(recipe)
    twist = settings["twist"] and " ".join(map(str, settings["twist"].values()))
    return settings | {"init": recipe.init or "none", "twist": twist or "none"}


def _other_recipe(
    path: Path, saved: Mapping[str, object], settings: Mapping[str, object]
) -> CheckpointError:
    changes = ", ".join(
        f"{name} {value} (now {settings[name]})"
        for name, value in saved.items()
        if value != settings[name]
    )
    return CheckpointError(
        f"{path} was made with {changes}; use the same settings, delete it, or give another "
        "--checkpoint."
    )
