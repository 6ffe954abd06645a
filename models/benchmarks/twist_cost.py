"""What a distortion of DeepTwist costs beside the training between two of them.

``python -m models.benchmarks.twist_cost`` trains a CIFAR ResNet-32 on random images and distorts it
now and then, by each method in turn: the medians of both, and their ratio at S_D = 200. The first
distortion of a method starts from nothing, the later ones from the factors before. With ``--metric
data`` distortions are fitted to the layers' inputs, which some steps before each look at: what
these take more than others is counted too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import nn

from models.reference.datasets import DATASETS
from models.reference.files import tell_table
from models.reference.networks import NETWORKS
from onnxlr.training import DeepTwist

_EVERY = 200
_BATCH = 128
_LOOKS = 4  # steps before a distortion that look at inputs
# Ranks of about half the parameters; tiles as DeepTwist's authors cut them.
METHODS: dict[str, float | tuple[int, ...]] = {
    "tucker2": 0.5,
    "channel-svd": 0.4,
    "spatial-svd": 0.25,
    "tiled-svd": 0.5,
    "cp": 0.8,
    "cp3": 0.8,
    "expand-at-load": 0.25,
}


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--network", default="resnet32", help="As models.reference.train names it.")
@click.option("--rounds", default=5, help="Distortions of each method.")
@click.option("--steps", default=4, help="Training steps between them.")
@click.option("--threads", default=2, help="Threads of PyTorch.")
@click.option("--metric", type=click.Choice(["weight", "data"]), default="weight")
@click.option("--method", "methods", multiple=True, default=tuple(METHODS), help="Repeatable.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
def main(
    network: str,
    rounds: int,
    steps: int,
    threads: int,
    metric: str,
    methods: tuple[str, ...],
    markdown: Path | None,
) -> None:
    """Time distortions and training steps, interleaved."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind, spec = NETWORKS[network], DATASETS["cifar10"]
    model = kind.build(spec, kind.width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    shape = (_BATCH, spec.channels, spec.side, spec.side)
    image = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    label = torch.randint(len(spec.classes), (_BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(image), label))
        optimizer.step()

    step()  # the first step also sets up what all use
    lines = [
        "| method | layers | training step, s | a look, s | first distortion, s | later ones, s "
        f"| of {_EVERY} steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in methods:
        trained = [seconds(step)]
        twist = DeepTwist(model, method, METHODS[method], _EVERY, exclude="^conv1$", metric=metric)
        # The first steps are looked at, and the twist isn't told that they are over.
        looked = [seconds(step)]
        first = seconds(twist.distort)
        distorted = []
        for _ in range(rounds):
            looked += [seconds(step) for _ in range(steps)]
            distorted.append(seconds(twist.distort))
            twist.finish()  # no more looks
            trained += [seconds(step) for _ in range(steps)]
            twist.load_state_dict(twist.state_dict())  # looks again
        usual, later = statistics.median(trained), statistics.median(distorted)
        look = statistics.median(looked) - usual if metric == "data" else 0.0
        lines.append(
            f"| {method} | {len(twist.plan.replaced)} | {usual:.3f} | {look:.3f} | {first:.3f} | "
            f"{later:.3f} | {(later + _LOOKS * look) / (_EVERY * usual):.2%} |"
        )
    tell_table(lines, markdown)


if __name__ == "__main__":
    main()
