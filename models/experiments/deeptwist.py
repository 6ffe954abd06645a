"""DeepTwist beside other ways to a network of low rank: Tucker-2 on a CIFAR ResNet.

``python -m models.experiments.deeptwist --data-dir DIR --out FOLDER`` starts from one pre-trained
network (``--init`` trained weights, first trained on to the images at hand). At each compression
it trains on with DeepTwist, and, with the same schedule and images, what Tucker-2 of that network
makes (the first comparison of Lee et al. 2019, arXiv 1905.10145). Both end with the same ranks and
parameters. ``--column`` trains others (``models/experiments/columns.py``), or one alone. Each run
adds a line to ``deeptwist.jsonl``, of which ``python -m models.experiments.deeptwist_table`` makes
a table; runs that were stopped go on from their checkpoints.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes

from models.experiments.columns import COLUMNS, measure, run_name
from models.experiments.record import (
    Record,
    Row,
    label_accuracy,
    mean_and_spread,
    out_option,
    quick_option,
)
from models.experiments.runs import make_bench, schedule_options
from models.reference.training import accuracy

# Published: ratio, DeepTwist, training the decomposed model; of a network of 92.63%.
PUBLISHED = {
    0.7: (1.57, 0.9292, 0.9220),
    0.6: (2.07, 0.9262, 0.9209),
    0.5: (2.81, 0.9243, 0.9175),
    0.4: (4.29, 0.9149, 0.9096),
    0.3: (6.72, 0.9043, 0.8977),
}
# What the published comparison compares, and what a row doesn't share with all of its bench.
_PUBLISHED_COLUMNS = ("deeptwist", "decomposed")
_OWN = ("epochs", "every", "schedule")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    default=tuple(PUBLISHED),
    help="Of the channels that ranks are; repeatable.",
)
@click.option(
    "--column",
    "columns",
    type=click.Choice(list(COLUMNS)),
    multiple=True,
    default=_PUBLISHED_COLUMNS,
    help="What is trained; repeatable.",
)
@schedule_options()
@out_option
@quick_option
def main(
    shares: tuple[float, ...],
    columns: tuple[str, ...],
    seeds: tuple[int, ...],
    out: Path,
    quick: bool,
    **options: Any,
) -> None:
    """Train ways to low rank, and compare DeepTwist with training the decomposed model."""
    if quick:
        shares, seeds = (0.5, 0.3)[: len(columns)], (0,)
    bench = make_bench(out, quick, **options)
    original = accuracy(bench.pretrained(), bench.test)
    settings = {name: value for name, value in bench.settings.items() if name not in _OWN}
    record = Record("deeptwist", out, settings)
    # A seed at all shares first: half of the time makes a whole table of fewer seeds.
    measured = {
        (column, share, seed): record.row(
            f"{run_name(bench, column, share)}-{seed}",
            partial(measure, bench, column, share, seed),
        )
        for seed in seeds
        for share in shares
        for column in columns
    }
    if not set(_PUBLISHED_COLUMNS) <= set(columns):
        return
    rows: list[Row] = []
    gains = []
    for share in shares:
        ends = {
            column: [measured[column, share, seed]["accuracy"] for seed in seeds]
            for column in columns
        }
        twist, chains = (ends[column] for column in _PUBLISHED_COLUMNS)
        first = measured["decomposed", share, seeds[0]]
        gained = [t - c for t, c in zip(twist, chains, strict=True)]
        gains += gained
        rows.append(
            {
                "compression": first["compression"],
                "untrained": first["truncated"],
                **{column: mean_and_spread(ends[column])[0] for column in columns},
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
        for key in columns:
            axes.plot(ratios, [100 * row[key] for row in rows], "o-", label=key)
        label_accuracy(axes, "compression of the distorted layers", original)

    record.write(
        f"{bench.schedule.network}, Tucker-2: DeepTwist and training the decomposed model",
        {
            "compression": ".2f",
            "untrained": ".2%",
            **dict.fromkeys(columns, ".2%"),
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
            f"{bench.steps:,} steps, {bench.schedule.schedule}, S_D {bench.schedule.every}.",
        ],
    )


if __name__ == "__main__":
    main()
