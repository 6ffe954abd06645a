"""DeepTwist beside training the decomposed model: Tucker-2 on a CIFAR ResNet.

``python -m models.experiments.deeptwist --data-dir DIR --out FOLDER`` starts from one pre-trained
network (``--init`` trained weights, first trained on to the images at hand). At each compression
it trains on with DeepTwist, and, with the same schedule and images, what Tucker-2 of that network
makes (the first comparison of Lee et al. 2019, arXiv 1905.10145). Both end with the same ranks and
parameters. Runs go on from their checkpoints.
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
    out_option,
    quick_option,
)
from models.experiments.runs import Bench, Made, make_bench, schedule_options, twisted
from models.reference.training import accuracy
from onnxlr.training import factorize_

# Published: ratio, DeepTwist, training the decomposed model; of a network of 92.63%.
PUBLISHED = {
    0.7: (1.57, 0.9292, 0.9220),
    0.6: (2.07, 0.9262, 0.9209),
    0.5: (2.81, 0.9243, 0.9175),
    0.4: (4.29, 0.9149, 0.9096),
    0.3: (6.72, 0.9043, 0.8977),
}
_STEM = "^conv1$"


def measure(bench: Bench, share: float, seed: int) -> Row:
    """Measure both ways at a share of the channels."""
    every = bench.schedule.every

    def with_twist(network: nn.Module) -> Made:
        return network, twisted(network, "tucker2", share, every, exclude=_STEM)

    def decomposed(network: nn.Module) -> Made:
        return factorize_(network, plan), None

    base = bench.pretrained()
    plan = twisted(base, "tucker2", share, every, exclude=_STEM).plan
    before = sum(d.params_before for d in plan.replaced)
    after = sum(d.params_after for d in plan.replaced)
    untrained = accuracy(factorize_(base, plan), bench.test)
    twist = bench.run(f"twist-{share}", seed, with_twist)
    chains = bench.run(f"decomposed-{share}", seed, decomposed)
    return {
        "share": share,
        "seed": seed,
        "compression": before / after,
        "layers": len(plan.replaced),
        "untrained": untrained,
        "deeptwist": accuracy(twist, bench.test),
        "decomposed": accuracy(chains, bench.test),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    default=tuple(PUBLISHED),
    help="Of the channels that ranks are; repeatable.",
)
@schedule_options()
@out_option
@quick_option
def main(
    shares: tuple[float, ...], seeds: tuple[int, ...], out: Path, quick: bool, **options: Any
) -> None:
    """Compare DeepTwist with training the decomposed model."""
    if quick:
        shares, seeds = (0.5, 0.3), (0,)
    bench = make_bench(out, quick, **options)
    original = accuracy(bench.pretrained(), bench.test)
    record = Record("deeptwist", out, bench.settings)
    rows: list[Row] = []
    gains = []
    # A seed at all shares first: half of the time makes a whole table of fewer seeds.
    measured = {
        (share, seed): record.row(f"{share}-{seed}", partial(measure, bench, share, seed))
        for seed in seeds
        for share in shares
    }
    for share in shares:
        each = [measured[share, seed] for seed in seeds]
        twist, chains = ([row[key] for row in each] for key in ("deeptwist", "decomposed"))
        gained = [t - c for t, c in zip(twist, chains, strict=True)]
        gains += gained
        rows.append(
            {
                "compression": each[0]["compression"],
                "untrained": each[0]["untrained"],
                "deeptwist": mean_and_spread(twist)[0],
                "decomposed": mean_and_spread(chains)[0],
                "gain": 100 * mean_and_spread(gained)[0],
                "gain_of_each_seed": ", ".join(f"{100 * g:+.2f}" for g in gained),
                "published_gain": 100 * (PUBLISHED[share][1] - PUBLISHED[share][2])
                if share in PUBLISHED
                else None,
            }
        )
    rows.sort(key=lambda row: row["compression"])
    mean, spread = mean_and_spread(gains)
    ahead = sum(row["gain"] > 0 for row in rows)

    def draw(axes: Axes) -> None:
        ratios = [row["compression"] for row in rows]
        for key in ("deeptwist", "decomposed"):
            axes.plot(ratios, [100 * row[key] for row in rows], "o-", label=key)
        label_accuracy(axes, "compression of the distorted layers", original)

    record.write(
        f"{bench.schedule.network}, Tucker-2: DeepTwist and training the decomposed model",
        {
            "compression": ".2f",
            "untrained": ".2%",
            "deeptwist": ".2%",
            "decomposed": ".2%",
            "gain": "+.2f",
            "gain_of_each_seed": "",
            "published_gain": "+.2f",
        },
        rows,
        draw,
        [
            f"Original {original:.2%} on {len(bench.test.label):,} test images; untrained: right "
            f"after decomposing it. DeepTwist is ahead at {ahead} of {len(rows)}; mean gain "
            f"{100 * mean:+.2f} points, standard deviation over runs {100 * spread:.2f}; seeds "
            f"{', '.join(map(str, seeds))}.",
        ],
    )


if __name__ == "__main__":
    main()
