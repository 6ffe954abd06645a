"""Where a network is trained: threads, device and precision, and their options of a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click
import torch

# Few enough to leave a small machine usable; fixed, because sums depend on the thread count.
THREADS = 2


@dataclass(frozen=True)
class Place:
    """The threads and the device that a network is trained on, and what its products are made in.

    `precision` is "float32" or "bfloat16": weights are float32 in either case.
    """

    threads: int = THREADS
    device: str = "cpu"
    precision: str = "float32"


def multiplies_bfloat16(device: str) -> bool:
    """Return whether a device multiplies bfloat16 by itself; elsewhere it is emulated, slowly."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Older versions of torch have no such list.
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def place_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add ``--threads``, ``--device`` and ``--precision``, which the command gets as ``place``."""

    @wraps(function)
    def placed(*, threads: int, device: str, precision: str, **options: Any) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise click.UsageError(
                "--device cuda: PyTorch sees no CUDA device; use a machine that has one and a "
                "build of PyTorch with CUDA, or leave the option out."
            )
        if precision == "auto":
            precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
        function(place=Place(threads, device, precision), **options)

    placed = click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        help="Of products while training: bfloat16 where the processor has it, or as named. "
        "Weights are float32.",
    )(placed)
    placed = click.option(
        "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to train."
    )(placed)
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=THREADS,
        help="Threads of PyTorch; another number rounds otherwise.",
    )(placed)
