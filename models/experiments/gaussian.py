"""The elements of a Gaussian matrix after compression by tiles of three sizes.

``python -m models.experiments.gaussian --out FOLDER``: SVD of every tile of a 1024 × 1024 matrix,
as one, as 16 × 16 and as 128 × 128 tiles, at a quarter of the elements (the figure of Lee et al.
2019, arXiv 1905.10145).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats import kurtosis

from models.experiments.record import Record, Row, mean_and_spread, out_option, quick_option
from onnxlr.decompose import join_tiles, tiled_svd

_RATIO = 4
_NEAR_ZERO = 0.05
_BINS = np.linspace(-2, 2, 161)


def compressed(weight: NDArray[np.float64], tiles: int, rank: int) -> NDArray[np.float64]:
    """Return the matrix that `tiles` × `tiles` tiles of a rank make, of the same shape."""
    left, right = tiled_svd(weight[None], rank, tiles, tiles)
    whole: NDArray[np.float64] = join_tiles(left @ right)[0]
    return whole


def measure(side: int, tiles: int, seed: int) -> Row:
    """Measure the error, and the shares and the kurtosis of the elements."""
    weight = np.random.default_rng(seed).standard_normal((side, side))
    # Two factors of a tile hold 2·rank of its side's elements.
    rank = side // tiles // (2 * _RATIO)
    product = compressed(weight, tiles, rank)
    counts, _ = np.histogram(product, _BINS, density=True)
    return {
        "tiles": f"{tiles}×{tiles}",
        "rank": rank,
        "seed": seed,
        "relative_error": float(np.linalg.norm(weight - product) / np.linalg.norm(weight)),
        "near_zero": float(np.mean(np.abs(product) < _NEAR_ZERO)),
        "beyond_1": float(np.mean(np.abs(product) > 1)),
        "kurtosis": float(kurtosis(product, axis=None, fisher=False)),
        "histogram": counts.tolist(),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Matrices drawn.")
@out_option
@quick_option
def main(seeds: int, out: Path, quick: bool) -> None:
    """Tabulate errors and histograms of a Gaussian matrix in tiles."""
    side, grids = (256, (1, 16, 32)) if quick else (1024, (1, 16, 128))
    seeds = 1 if quick else seeds
    record = Record("gaussian", out, {"side": side, "ratio": _RATIO, "seeds": seeds})
    shown, drawn = [], {}
    for tiles in grids:
        rows = [
            record.row(f"{tiles}-{seed}", partial(measure, side, tiles, seed))
            for seed in range(seeds)
        ]
        means = {
            key: mean_and_spread([row[key] for row in rows])
            for key in ("relative_error", "near_zero", "beyond_1", "kurtosis")
        }
        shown.append(
            {key: rows[0][key] for key in ("tiles", "rank")}
            | {key: mean for key, (mean, _) in means.items()}
            | {"spread_of_error": means["relative_error"][1]}
        )
        drawn[f"{rows[0]['tiles']} tiles, rank {rows[0]['rank']}"] = rows[0]["histogram"]

    def draw(axes: Axes) -> None:
        for label, counts in drawn.items():
            axes.stairs(counts, _BINS, label=label)
        axes.set_xlabel("element")
        axes.set_ylabel("density")
        axes.legend()

    record.write(
        f"A {side}×{side} Gaussian matrix, SVD of every tile at {_RATIO}× compression",
        {
            "tiles": "",
            "rank": "d",
            "relative_error": ".4f",
            "spread_of_error": ".4f",
            "near_zero": ".2%",
            "beyond_1": ".2%",
            "kurtosis": ".3f",
        },
        shown,
        draw,
        [f"near zero: share of elements below {_NEAR_ZERO} in magnitude; beyond 1: above 1."],
    )


if __name__ == "__main__":
    main()
