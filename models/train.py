"""Command line that trains a network on Fashion-MNIST, resumably, and exports it to ONNX."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import onnxruntime as ort
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from models.checkpoint import NETWORKS, Recipe, Run, load_run, new_run, save_run
from models.export import export_onnx
from models.fashion import DEFAULT_DATA_DIR, load_split

# Few enough to leave a small machine usable; fixed, because sums depend on the thread count.
_THREADS = 2
_EXPORT_CHECK_IMAGES = 64
_EVALUATION_BATCH = 1000
_INTERRUPTED = 130


@dataclass(frozen=True)
class _Defaults:
    width: int
    epochs: int
    lr: float


_DEFAULTS = {
    "mlp": _Defaults(width=1024, epochs=15, lr=1e-3),
    "cnn": _Defaults(width=32, epochs=8, lr=2e-3),
    "vgg": _Defaults(width=64, epochs=6, lr=1e-3),
}


def _shown(name: str) -> str:
    """The defaults of one option, for its help text."""
    return ", ".join(f"{network} {getattr(of, name)}" for network, of in _DEFAULTS.items())


@dataclass(frozen=True)
class Data:
    """image: (n, 1, 28, 28) uint8, kept small until a batch is drawn; label: (n,) int64."""

    image: Tensor
    label: Tensor


def load_data(data_dir: Path, split: str) -> Data:
    """The "train" or "test" images of Fashion-MNIST."""
    read = load_split(data_dir, split)
    return Data(torch.tensor(read.image).unsqueeze(1), torch.tensor(read.label).long())


def pixels(image: Tensor) -> Tensor:
    """Bytes as float32 in 0..1, shape unchanged."""
    return image.float() / 255


def _flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror about half of the images left to right; shape (n, 1, 28, 28) unchanged."""
    chosen = torch.rand(len(image), 1, 1, 1, generator=generator) < 0.5  # (n, 1, 1, 1)
    return torch.where(chosen, image.flip(3), image)


def train_epoch(run: Run, data: Data, epochs: int, progress: Progress, task: TaskID) -> float:
    """Run one of `epochs` epochs and return its mean loss, in nats an image.

    The learning rate falls along a half cosine from the recipe's to 0 at the end of the last
    epoch. It's computed from the step alone, so that a resumed run needs no scheduler state.
    """
    run.network.train()
    recipe = run.recipe
    order = torch.randperm(len(data.label), generator=run.generator)  # (n,)
    batches = torch.split(order, recipe.batch_size)
    progress.reset(task, total=len(batches))
    total_loss = 0.0
    for step, chosen in enumerate(batches):
        done = (run.epoch + step / len(batches)) / epochs
        for group in run.optimizer.param_groups:
            group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
        image = pixels(data.image[chosen])  # (b, 1, 28, 28)
        if recipe.network != "mlp":
            image = _flip(image, run.generator)  # (b, 1, 28, 28)
        logits = run.network(image)  # (b, 10)
        loss = nn.functional.cross_entropy(logits, data.label[chosen])  # ()
        run.optimizer.zero_grad()
        torch.autograd.backward(loss)
        run.optimizer.step()
        total_loss += loss.item() * len(chosen)
        progress.advance(task)
    run.epoch += 1
    return total_loss / len(order)


def accuracy(network: nn.Module, data: Data) -> float:
    """Fraction of the images whose largest logit is at their label."""
    network.eval()
    hits = 0
    with torch.no_grad():
        pairs = zip(
            torch.split(data.image, _EVALUATION_BATCH),
            torch.split(data.label, _EVALUATION_BATCH),
            strict=True,
        )
        for image, label in pairs:
            logits = network(pixels(image))  # (b, 10)
            hits += int((logits.argmax(dim=1) == label).sum())
    return hits / len(data.label)


def exported_accuracy(model: bytes, data: Data) -> float:
    """The same of an exported model, in ONNX Runtime."""
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
    """Train up to `epochs` epochs in all, saving and reporting after each."""
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
        while run.epoch < epochs:
            progress.update(task, description=f"epoch {run.epoch + 1}/{epochs}")
            loss = train_epoch(run, train, epochs, progress, task)
            save_run(run, checkpoint)
            console.print(
                f"epoch {run.epoch}/{epochs}: loss {loss:.4f}, "
                f"test accuracy {accuracy(run.network, test):.2%}"
            )


def make_model(
    recipe: Recipe,
    train: Data,
    test: Data,
    epochs: int,
    checkpoint: Path,
    export: Path,
    console: Console,
) -> None:
    """Train up to `epochs` epochs in all, from the checkpoint if there is one, and export.

    Ctrl-C ends the process; what was trained until then is in the checkpoint.
    """
    torch.set_num_threads(_THREADS)
    if checkpoint.exists():
        run = load_run(recipe, checkpoint)
        console.print(f"{checkpoint}: {run.epoch} epochs done")
    else:
        run = new_run(recipe)
        # Saved at once: a checkpoint that can't be written should show before an epoch is spent.
        save_run(run, checkpoint)
    try:
        _train(run, train, test, epochs, checkpoint, console)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on from {checkpoint}")
        sys.exit(_INTERRUPTED)

    console.print(f"test accuracy {accuracy(run.network, test):.2%}")
    difference = export_onnx(run.network, pixels(test.image[:_EXPORT_CHECK_IMAGES]), export)
    console.print(
        f"{export}: {export.stat().st_size:,} bytes; "
        f"logits within {difference:.1e} of PyTorch's in ONNX Runtime",
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("network", type=click.Choice(sorted(NETWORKS)))
@click.option(
    "--width",
    type=click.IntRange(min=1),
    show_default=_shown("width"),
    help="Units of a hidden layer (mlp), channels of the first convolution (cnn, vgg).",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), show_default=_shown("epochs"), help="Epochs in all."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, help="Images a step.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    show_default=_shown("lr"),
    help="Learning rate at the start; it falls to 0 along a half cosine.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, help="Seed of the weights, order and flips."
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=DEFAULT_DATA_DIR,
    help="Folder with the Fashion-MNIST IDX files.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="fashion-NETWORK-WIDTH.pt",
    help="Written after each epoch; resumed from if it exists.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="fashion-NETWORK-WIDTH.onnx",
    help="ONNX file to write at the end.",
)
def main(
    network: str,
    width: int | None,
    epochs: int | None,
    batch_size: int,
    lr: float | None,
    seed: int,
    data_dir: Path,
    checkpoint: Path | None,
    export: Path | None,
) -> None:
    """Train NETWORK on Fashion-MNIST and export it to ONNX.

    mlp is 784 -> 5 x WIDTH -> 10; cnn has five 3x3 convolutions of WIDTH to 4 x WIDTH channels,
    vgg has seven.
    Ctrl-C stops a run; the same command goes on from its last whole epoch.

    \b
    Example:
      python -m models.train mlp --width 384 --export models/fashion-mlp.onnx
    """
    defaults = _DEFAULTS[network]
    width = width or defaults.width
    epochs = epochs or defaults.epochs
    checkpoint = checkpoint or Path(f"fashion-{network}-{width}.pt")
    export = export or Path(f"fashion-{network}-{width}.onnx")
    recipe = Recipe(network, width, batch_size, lr or defaults.lr, seed)

    console = Console(highlight=False, soft_wrap=True)
    train, test = load_data(data_dir, "train"), load_data(data_dir, "test")
    make_model(recipe, train, test, epochs, checkpoint, export, console)


if __name__ == "__main__":
    main()
