"""Accuracy against the distortion step S_D of DeepTwist.

``python -m models.experiments.distortion_step --data-dir DIR --out FOLDER``: Tucker-2 at one share
of the channels of a CIFAR ResNet, distorted every 1 to 5000 steps of the same schedule (Lee et al.
2019, arXiv 1905.10145, section 2). Whatever S_D is, training ends on a distortion.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes

from models.experiments import columns
from models.experiments.record import (
    Record,
    Row,
    label_accuracy,
    mean_and_spread,
    note_on_seeds,
    out_option,
    quick_option,
)
from models.experiments.runs import Bench, make_bench, schedule_options
from models.reference.training import accuracy

STEPS = (1, 5, 20, 100, 200, 500, 1000, 5000)


def measure(bench: Bench, share: float, every: int, seed: int) -> Row:
    """Measure the accuracy at one S_D."""
    schedule = replace(bench.schedule, every=every)
    row = columns.measure(replace(bench, schedule=schedule), "deeptwist", share, seed)
    return {"distortion_step": every, **row}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    help="Of the channels that ranks are.",
)
@click.option("--step", "steps", multiple=True, default=STEPS, help="S_D; repeatable.")
@schedule_options()
@out_option
@quick_option
def main(
    share: float,
    steps: tuple[int, ...],
    seeds: tuple[int, ...],
    out: Path,
    quick: bool,
    **options: Any,
) -> None:
    """Train with DeepTwist at several distortion steps."""
    if quick:
        steps, seeds = (1, 3), (0,)
    # S_D differs from run to run, so the value of --every isn't part of the settings.
    bench = make_bench(out, quick, **options)
    original = accuracy(bench.pretrained(), bench.test)
    settings = {k: v for k, v in bench.settings.items() if k != "every"}
    record = Record("distortion-step", out, settings | {"share": share})
    measured = {
        (every, seed): record.row(
            f"{every}-{seed}",
            partial(measure, bench, share, every, seed),
        )
        for seed in seeds
        for every in steps
    }
    rows = []
    for every in steps:
        mean, spread = mean_and_spread([measured[every, seed]["accuracy"] for seed in seeds])
        rows.append({**measured[every, seeds[0]], "accuracy": mean, "spread": 100 * spread})

    def draw(axes: Axes) -> None:
        axes.errorbar(
            [row["distortion_step"] for row in rows],
            [100 * row["accuracy"] for row in rows],
            [row["spread"] for row in rows],
            fmt="o-",
            capsize=3,
        )
        axes.set_xscale("log")
        label_accuracy(axes, "S_D, steps between distortions", original)

    record.write(
        f"{bench.schedule.network}, Tucker-2 at {share:g} of the channels: accuracy against S_D",
        {"distortion_step": "d", "distortions": "d", "accuracy": ".2%", "spread": ".2f"},
        rows,
        draw,
        [
            note_on_seeds(original, len(bench.test.label), seeds),
        ],
    )


if __name__ == "__main__":
    main()
