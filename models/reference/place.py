"""Where a network is trained: the threads and the device, and their two options of a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click
import torch

# Few enough to leave a small machine usable; fixed, because sums depend on the thread count.
THREADS = 2


@dataclass(frozen=True)
class Place:
    """The threads and the device that a network is trained on."""

    threads: int = THREADS
    device: str = "cpu"


def place_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add ``--threads`` and ``--device``, which the command gets as ``place``."""

    @wraps(function)
    def placed(*, threads: int, device: str, **options: Any) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise click.UsageError(
                "--device cuda: PyTorch sees no CUDA device; use a machine that has one and a "
                "build of PyTorch with CUDA, or leave the option out."
            )
        function(place=Place(threads, device), **options)

    placed = click.option(
        "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to train."
    )(placed)
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=THREADS,
        help="Threads of PyTorch; another number rounds otherwise.",
    )(placed)
