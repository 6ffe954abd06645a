"""The ways to a network of low rank that are compared: what each trains, and what it ends at.

All begin with the same pre-trained CIFAR ResNet, take the same steps on the same images, and end
with about the same number of parameters in the convolutions behind the stem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

import onnxlr
from models.experiments.record import Row
from models.experiments.runs import Bench, Made, twisted
from models.reference.datasets import pixels
from models.reference.export import CHECK_IMAGES, export_onnx
from models.reference.files import replace_file
from models.reference.training import accuracy, device_of
from onnxlr.plan.plan import Plan
from onnxlr.training import DeepTwist, factorize_

STEM = "^conv1$"
# Methods that write chains, among which a plan chooses.
_CHAINS = ("spatial-svd", "channel-svd", "input-channel-svd", "tucker2")
# Of the images that are trained on, so many tell a plan what layers are given, and a ninth of them
# what its choices lose.
_DRAWN = 1152
_BATCH = 128
_BATCHES = 4  # that a look takes


def tucker_plan(bench: Bench, share: float) -> Plan:
    """Return the plan of Tucker-2 at a share of the channels, behind the stem."""
    return twisted(bench.pretrained(), "tucker2", share, 1, exclude=STEM).plan


def optimized_plan(bench: Bench, share: float) -> tuple[Path, Path]:
    """Return a plan of `onnxlr optimize` with as many parameters as Tucker-2, and its model.

    Both are kept in the folder of the bench.
    """
    exported, path = bench.folder / "base.onnx", bench.folder / f"plan-{share}.json"
    if path.exists():
        return path, exported
    network = bench.pretrained()
    whole = sum(p.numel() for p in network.parameters())
    export_onnx(network, pixels(bench.train.image[:CHECK_IMAGES]), exported)
    files = bench.folder / "fitted.npz", bench.folder / "judged.npz"
    for drawn, file in zip(_drawn(bench), files, strict=True):
        np.savez(file, image=pixels(bench.train.image[drawn]).numpy())
    spared = sum(d.params_before - d.params_after for d in tucker_plan(bench, share).replaced)
    try:
        result = onnxlr.optimize(
            exported,
            data=files[0],
            validation=files[1],
            metric="rel-error",
            max_drop=1,
            method=_CHAINS,
            target=f"params={1 - spared / whole:.4f}",
        )
    except onnxlr.OnnxlrError as error:
        raise click.ClickException(f"no plan at {share:g} of the channels: {error}") from error
    replace_file(path, result.plan.to_json().encode())
    return path, exported


def _fitted(bench: Bench) -> Tensor:
    """The training images that factors are fitted to, as the network takes them."""
    return pixels(bench.train.image[_drawn(bench)[0]])


def _drawn(bench: Bench) -> tuple[Tensor, ...]:
    """Which images factors are fitted to, and which others tell what choices lose."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(bench.train.label), generator=generator)[:_DRAWN]
    return drawn[: len(drawn) * 8 // 9], drawn[len(drawn) * 8 // 9 :]


@dataclass(frozen=True)
class Column:
    """A way to train: the whole network with DeepTwist, or the chains of a plan."""

    plan: Callable[[Bench, float], tuple[Plan | Path, Path | None]] | None = None
    """What names the chains at a share of the channels, and the model that it was made for."""
    metric: str = "weight"
    """What a distortion loses least of."""
    factors: float = 0.0
    """For which last share of the steps what DeepTwist ends at is trained as factors."""

    def maker(self, bench: Bench, share: float) -> Callable[[nn.Module], Made]:
        """Return what makes of the pre-trained network what is trained."""
        if self.plan is not None:
            plan, exported = self.plan(bench, share)
            # Where a plan was made with data, its chains begin as what loses least on them.
            batches = None if exported is None else torch.split(_fitted(bench), _BATCH)
            return lambda network: (factorize_(network, plan, exported, inputs=batches), None)
        every = bench.schedule.every
        where = {"exclude": STEM, "metric": self.metric}
        return lambda network: (network, twisted(network, "tucker2", share, every, **where))


COLUMNS = {
    "deeptwist": Column(),
    "data-metric": Column(metric="data"),
    "twist-then-factors": Column(factors=0.1),
    "decomposed": Column(lambda bench, share: (tucker_plan(bench, share), None)),
    "plan": Column(optimized_plan),
}


def run_name(bench: Bench, column: str, share: float) -> str:
    """Return what a run and its row are called: all that makes another run of the same bench."""
    s = bench.schedule
    every = f"-every-{s.every}" if COLUMNS[column].plan is None else ""
    return f"{column}-{share:g}-{s.epochs}-epochs-{s.schedule}{every}"


def measure(bench: Bench, column: str, share: float, seed: int) -> Row:
    """Train one column at a share of the channels with one seed; a run that was cut goes on."""
    s = bench.schedule
    maker = COLUMNS[column].maker(bench, share)
    network, twist = maker(bench.pretrained())
    distortions = 0
    if twist is not None:
        distort_once(bench, network, twist)
        twisting = bench.steps - int(COLUMNS[column].factors * bench.steps)
        distortions = twisting // s.every + 1
    plan = tucker_plan(bench, share)
    whole, stored = (_parameters(n) for n in (bench.pretrained(), network))
    spared = whole - stored  # of chains; weights that are distorted are stored whole
    if twist is not None:
        spared = sum(d.params_before - d.params_after for d in plan.replaced)
    before = sum(d.params_before for d in plan.replaced)
    truncated = accuracy(network, bench.test)
    run = bench.run(run_name(bench, column, share), seed, maker, COLUMNS[column].factors)
    return {
        "column": column,
        "share": share,
        "seed": seed,
        "compression": before / (before - spared),
        "layers": len(plan.replaced),
        "epochs": s.epochs,
        "steps": bench.steps,
        "schedule": s.schedule,
        "every": None if twist is None else s.every,
        "distortions": distortions or None,
        "truncated": truncated,
        "accuracy": accuracy(run.network, bench.test),
        "seconds": round(run.seconds, 1),
    }


def distort_once(bench: Bench, network: nn.Module, twist: DeepTwist) -> None:
    """Distort a network that hasn't been trained on, after a look at what its layers are given."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    batches = torch.split(bench.train.image, bench.schedule.batch_size)[:_BATCHES]
    with torch.no_grad():
        for image in batches:
            network(pixels(image).to(device_of(network)))
    network.load_state_dict(before)  # running statistics have moved
    twist.finish()


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
