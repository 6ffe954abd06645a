"""DeepTwist with SVD of tiles on the largest convolutions of a CIFAR ResNet.

``python -m models.experiments.tiles --data-dir DIR --out FOLDER``: the 9 convolutions of 64 × 64
channels, each lowered to a 64 × 576 matrix that is cut into square tiles of one rank, at 2× and 4×
compression (table 1 of Lee et al. 2019, arXiv 1905.10145).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes
from torch import nn

from models.experiments.record import (
    Record,
    Row,
    label_accuracy,
    mean_and_spread,
    note_on_seeds,
    out_option,
    quick_option,
)
from models.experiments.runs import Bench, Made, make_bench, schedule_options, twisted
from models.reference.training import accuracy

# Published accuracy by compression and side of a tile.
PUBLISHED = {
    (2, 64): 0.9334,
    (2, 32): 0.9311,
    (2, 16): 0.9301,
    (2, 8): 0.9323,
    (4, 64): 0.9294,
    (4, 32): 0.9297,
    (4, 16): 0.9300,
    (4, 8): 0.9281,
}
# Tiles across kernel positions have no chain of convolutions; as stored factors they exist.
_METHOD = "expand-at-load"


def measure(bench: Bench, compression: int, side: int, seed: int) -> Row:
    """Measure one tile size at one compression."""
    wide = 4 * bench.schedule.width
    rank = side // (2 * compression)
    grid = (rank, wide // side, wide * 9 // side)

    def largest(_name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.weight.numel() == wide * wide * 9

    def with_twist(network: nn.Module) -> Made:
        twist = twisted(network, _METHOD, grid, bench.schedule.every, include=largest)
        return network, twist

    trained = bench.run(f"tiles-{side}-rank-{rank}", seed, with_twist).network
    plan = with_twist(bench.pretrained())[1]
    assert plan is not None
    return {
        "compression": compression,
        "side": side,
        "rank": rank,
        "seed": seed,
        "layers": len(plan.plan.replaced),
        "accuracy": accuracy(trained, bench.test),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--compression",
    "compressions",
    multiple=True,
    default=(2, 4),
    help="Of the nine layers; repeatable.",
)
@click.option(
    "--side", "sides", multiple=True, default=(64, 32, 16, 8), help="Of a tile; repeatable."
)
@schedule_options()
@out_option
@quick_option
def main(
    compressions: tuple[int, ...],
    sides: tuple[int, ...],
    seeds: tuple[int, ...],
    out: Path,
    quick: bool,
    **options: Any,
) -> None:
    """Train with DeepTwist on tiles of several sizes."""
    if quick:
        sides, seeds = (8,), (0,)
    cases = [(compression, side) for compression in compressions for side in sides]
    bench = make_bench(out, quick, **options)
    original = accuracy(bench.pretrained(), bench.test)
    record = Record("tiles", out, bench.settings)
    measured = {
        (case, seed): record.row(
            f"{case[0]}x-{case[1]}-{seed}",
            partial(measure, bench, *case, seed),
        )
        for seed in seeds
        for case in cases
    }
    rows = []
    for case in cases:
        each = [measured[case, seed]["accuracy"] for seed in seeds]
        mean, spread = mean_and_spread(each)
        first = measured[case, seeds[0]]
        rows.append(
            {
                **first,
                "tiles": f"{case[1]}×{case[1]}",
                "accuracy": mean,
                "spread": 100 * spread,
                "published": PUBLISHED.get(case),
            }
        )

    def draw(axes: Axes) -> None:
        for compression in dict.fromkeys(case[0] for case in cases):
            shown = [row for row in rows if row["compression"] == compression]
            sides = [row["tiles"] for row in shown]
            axes.plot(sides, [100 * r["accuracy"] for r in shown], "o-", label=f"{compression}×")
        label_accuracy(axes, "tile", original)

    record.write(
        f"{bench.schedule.network}: DeepTwist with SVD of tiles of the largest convolutions",
        {
            "compression": "d",
            "tiles": "",
            "rank": "d",
            "layers": "d",
            "accuracy": ".2%",
            "spread": ".2f",
            "published": ".2%",
        },
        rows,
        draw,
        [
            note_on_seeds(original, len(bench.test.label), seeds),
        ],
    )


if __name__ == "__main__":
    main()
