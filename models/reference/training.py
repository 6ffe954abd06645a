"""Training a network resumably, epoch by epoch, and its accuracy."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import onnxruntime as ort
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from models.reference.checkpoint import (
    Recipe,
    Run,
    load_run,
    new_run,
    save_run,
    to_factors,
)
from models.reference.datasets import DATASETS, Data, DataSet, pixels
from models.reference.networks import NETWORKS
from models.reference.place import Place
from onnxlr.errors import ModelError
from onnxlr.training import DeepTwist

_EVALUATION_BATCH = 1000
_INTERRUPTED = 130
_HERE = Place()
# How long a run that is killed may have trained for nothing.
_CHECKPOINT_SECONDS = 180.0
_DROPS = (0.5, 0.75)


class DivergedError(click.ClickException):
    """The loss or a weight is no longer a number; the last checkpoint is as it was."""


def _half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _steps(done: float) -> float:
    return math.prod(0.1 for drop in _DROPS if done >= drop)


SCHEDULES: dict[str, Callable[[float], float]] = {"half-cosine": _half_cosine, "steps": _steps}
"""The share of the first learning rate that is left after a share of the steps.

"half-cosine" falls to 0; "steps" falls to a tenth after a half and three quarters (He et al. 2015).
"""


def augment(image: Tensor, spec: DataSet, generator: torch.Generator) -> Tensor:
    """Return bytes, (n, C, S, S), about half of them mirrored, moved by up to `spec.shift`."""
    n, side, shift = len(image), spec.side, spec.shift
    if spec.flipped:
        chosen = torch.rand(n, 1, 1, 1, generator=generator) < 0.5  # (n, 1, 1, 1)
        image = torch.where(chosen, image.flip(3), image)  # (n, C, S, S)
    if shift:
        padded = nn.functional.pad(image, (shift,) * 4)  # (n, C, S + 2 shift, S + 2 shift)
        corner = torch.randint(2 * shift + 1, (2, n, 1), generator=generator)
        row, column = corner + torch.arange(side)  # (n, S) each
        each = torch.arange(n).reshape(-1, 1, 1)  # (n, 1, 1)
        image = padded.permute(0, 2, 3, 1)[each, row[:, :, None], column[:, None]]  # (n, S, S, C)
        image = image.permute(0, 3, 1, 2)  # (n, C, S, S)
    return image


def _untold(_done: int, _total: int) -> None:
    """Report no progress."""


def train_epoch(
    run: Run, data: Data, epochs: int, tell: Callable[[int, int], None] = _untold
) -> float:
    """Run one of `epochs` epochs, or what is left of it, and return its mean loss.

    The loss is in nats an image. `tell` is called after each step with the steps done and those of
    the epoch; a run that is saved there goes on from there. The learning rate falls by the recipe's
    schedule. It's computed from the step alone, so that a resumed run needs no scheduler state.

    Raises DivergedError when the loss or a weight is no longer a number.
    """
    run.network.train()
    recipe = run.recipe
    kind, spec = NETWORKS[recipe.network], DATASETS[recipe.data]
    layout = torch.channels_last if kind.channels_last else torch.contiguous_format
    if run.order is None:
        run.order = torch.randperm(len(data.label), generator=run.generator)  # (n,)
    batches = torch.split(run.order, recipe.batch_size)
    device = device_of(run.network)
    for step in range(run.step, len(batches)):
        chosen = batches[step]
        done = (run.epoch + step / len(batches)) / epochs
        lr = recipe.lr * SCHEDULES[recipe.schedule](done)
        left = (epochs - run.epoch) * len(batches) - step
        as_factors = max(1.0, recipe.factors * epochs * len(batches)) if recipe.factors else 0.0
        if run.twist is not None and not run.factorized and left <= as_factors:
            _distort(run.twist.finish, run, lr)
            to_factors(run)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        image = data.image[chosen]  # (b, C, S, S)
        if kind.augmented:
            image = augment(image, spec, run.generator)  # (b, C, S, S)
        image = pixels(image.to(device)).contiguous(memory_format=layout)  # (b, C, S, S)
        with torch.autocast(device.type, torch.bfloat16, recipe.precision == "bfloat16"):
            logits = run.network(image)  # (b, 10)
            loss = nn.functional.cross_entropy(logits, data.label[chosen].to(device))  # ()
        if not math.isfinite(loss.item()):
            raise _diverged(run, lr, f"the loss is {loss.item()}")
        run.optimizer.zero_grad()
        torch.autograd.backward(loss)
        run.optimizer.step()
        if run.twist is not None and not run.factorized:
            _distort(run.twist.step, run, lr)
        run.loss += loss.item() * len(chosen)
        run.step += 1
        tell(run.step, len(batches))
    if run.twist is not None and not run.factorized and run.epoch + 1 == epochs:
        _distort(run.twist.finish, run, 0.0)
    check_finite(run)
    mean = run.loss / len(run.order)
    run.epoch, run.step, run.order, run.loss = run.epoch + 1, 0, None, 0.0
    return mean


def check_finite(run: Run) -> None:
    """Refuse weights that the last step lost: no loss was computed from them yet.

    Raises DivergedError when one is no longer a number; it would spoil the checkpoint.
    """
    for name, weight in run.network.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            lr = run.optimizer.param_groups[0]["lr"]
            raise _diverged(run, lr, f"{name} is no longer finite", done=run.step)


def _distort(distort: Callable[[], object], run: Run, lr: float) -> None:
    try:
        distort()
    except ModelError as error:
        raise _diverged(run, lr, "a weight is no longer finite") from error


def _diverged(run: Run, lr: float, what: str, done: int | None = None) -> DivergedError:
    step = run.step + 1 if done is None else done
    return DivergedError(
        f"epoch {run.epoch + 1}, step {step}: {what} at a learning rate of {lr:.3g} "
        f"(--lr {run.recipe.lr:g}); start again with a lower --lr, such as {run.recipe.lr / 10:g}, "
        "and another --checkpoint: the last one is kept."
    )


def device_of(network: nn.Module) -> torch.device:
    """Return the device that holds a network's weights."""
    return next(network.parameters()).device


def _hits(network: nn.Module, data: Data) -> Tensor:
    """Return whether the largest logit of each image is at its label, shape (n,)."""
    network.eval()
    device = device_of(network)
    with torch.no_grad():
        # (n,), batch by batch
        classes = [
            network(pixels(image.to(device))).argmax(1).cpu()
            for image in torch.split(data.image, _EVALUATION_BATCH)
        ]
    return torch.cat(classes) == data.label


def accuracy(network: nn.Module, data: Data) -> float:
    """Return the fraction of the images whose largest logit is at their label."""
    return int(_hits(network, data).sum()) / len(data.label)


def class_accuracy(network: nn.Module, data: Data, classes: int = 10) -> list[float]:
    """Return the accuracy on the images of each class; NaN for a class without any."""
    hits = _hits(network, data)
    return [float(hits[data.label == label].float().mean()) for label in range(classes)]


def exported_accuracy(model: bytes, data: Data) -> float:
    """Return the accuracy of an exported model in ONNX Runtime."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    hits = 0
    pairs = zip(
        torch.split(data.image, _EVALUATION_BATCH),
        torch.split(data.label, _EVALUATION_BATCH),
        strict=True,
    )
    for image, label in pairs:
        (logits,) = session.run(["logits"], {"image": pixels(image).numpy()})  # (b, 10)
        hits += int((logits.argmax(1) == label.numpy()).sum())
    return hits / len(data.label)


def _train(
    run: Run, train: Data, test: Data, epochs: int, checkpoint: Path, console: Console
) -> None:
    """Train up to `epochs` epochs in all, saving every few minutes and reporting after each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # In a log, a bar that has gone would leave an empty line.
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("")
        begun = saved = time.monotonic()
        begun -= run.seconds

        def save() -> None:
            nonlocal saved
            saved = time.monotonic()
            run.seconds = saved - begun
            save_run(run, checkpoint)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if done < total and time.monotonic() - saved >= _CHECKPOINT_SECONDS:
                check_finite(run)
                save()

        while run.epoch < epochs:
            progress.reset(task, description=f"epoch {run.epoch + 1}/{epochs}")
            loss = train_epoch(run, train, epochs, tell)
            save()
            console.print(
                f"epoch {run.epoch}/{epochs}: loss {loss:.4f}, "
                f"test accuracy {accuracy(run.network, test):.2%}"
            )


def train_model(
    recipe: Recipe,
    train: Data,
    test: Data,
    epochs: int,
    checkpoint: Path,
    console: Console,
    network: nn.Module | None = None,
    twist: DeepTwist | None = None,
    place: Place = _HERE,
) -> Run:
    """Train up to `epochs` epochs in all, from the checkpoint if there is one.

    It trains the recipe's network and twist, or `network` and `twist`. Ctrl-C ends the process;
    what was trained until then is in the checkpoint.
    """
    torch.set_num_threads(place.threads)
    if checkpoint.exists():
        run = load_run(recipe, checkpoint, network, twist, place.device)
        begun = f" and {run.step} steps" if run.step else ""
        console.print(f"{checkpoint}: {run.epoch} epochs{begun} done")
    else:
        run = new_run(recipe, network, twist, place.device)
        # Saved at once: a checkpoint that can't be written should show before an epoch is spent.
        save_run(run, checkpoint)
    with stopping(checkpoint, console):
        _train(run, train, test, epochs, checkpoint, console)
        console.print(f"test accuracy {accuracy(run.network, test):.2%}")
    return run


@contextmanager
def stopping(checkpoint: Path, console: Console) -> Iterator[None]:
    """End the process on Ctrl-C as a shell expects it, and say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on from {checkpoint}")
        sys.exit(_INTERRUPTED)
