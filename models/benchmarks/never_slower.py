"""Check on seeded random graphs that nothing gets slower, larger or wrong.

``python -m models.benchmarks.never_slower --out FOLDER`` optimizes each graph for latency within a
rel-error of 0.2, every second one on random samples, the others on synthetic inputs, and then times
what was written beside what it was made of, anew. What comes out slower is timed once more, longer:
a 95% interval lies wrong now and then. It ends with an error if one is slower still, or larger, or
further from the original than allowed.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx

import onnxlr
from models.benchmarks.random_graphs import random_graph
from models.reference.files import tell_table
from onnxlr.verify.latency import Comparison

LIMIT = 0.2
_SAMPLES = 64
_LONGER = 12.0  # seconds of the second benchmark


@dataclass(frozen=True)
class Row:
    """The result of one graph: its layers, and the written file beside the original."""

    seed: int
    replaced: int
    layers: int
    rel_error: float
    bytes: tuple[int, int]
    speed: Comparison

    @property
    def faults(self) -> list[str]:
        """The promises that this graph broke."""
        broken = {
            # An untouched graph is the same file: what tells the two apart is noise.
            "slower": bool(self.replaced) and self.speed.verdict == "slower",
            "larger": self.bytes[1] > self.bytes[0],
            "further off": self.rel_error > (LIMIT if self.replaced else 0),
        }
        return [name for name, so in broken.items() if so]


def write_samples(model: onnx.ModelProto, folder: Path, seed: int) -> list[Path]:
    """Write normal samples for the one input of a graph: to fit to, and to judge on."""
    one, *rest = (d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    rng = np.random.default_rng(seed)
    paths = [folder / f"{seed:03}-{name}.npz" for name in ("calibration", "validation")]
    for path in paths:
        np.savez(path, x=rng.standard_normal((_SAMPLES * one, *rest)).astype(np.float32))
    return paths


def check(seed: int, folder: Path) -> Row:
    """Optimize the graph of a seed, and measure what was written."""
    model = random_graph(seed)
    before, after = folder / f"{seed:03}.onnx", folder / f"{seed:03}-optimized.onnx"
    onnx.save(model, before)
    data, validation = write_samples(model, folder, seed) if seed % 2 else (None, None)
    result = onnxlr.optimize(
        before,
        after,
        data=data,
        validation=validation,
        metric="rel-error",
        max_drop=LIMIT,
        target="latency",
    )
    # On the samples that judged it, the synthetic ones too: those are drawn from the same seed.
    comparison = onnxlr.compare(before, after, data=validation, metric="rel-error")
    speed = comparison.speed
    if speed.verdict == "slower":
        again = onnxlr.bench(before, after, data=validation, seconds=_LONGER).comparison
        assert again is not None
        speed = again
    return Row(
        seed,
        len(result.plan.replaced),
        len(result.plan.decisions),
        comparison.quality.optimized,
        (comparison.a.bytes, comparison.b.bytes),
        speed,
    )


def table(rows: list[Row]) -> list[str]:
    """Return the counts, then a line for each graph that was changed or broke a promise."""
    changed = [row for row in rows if row.replaced]
    verdicts = Counter(row.speed.verdict for row in changed)
    faults = Counter(fault for row in rows for fault in row.faults)
    lines = [
        "| graphs | replaced | faster | within noise | slower | larger | over the limit |",
        "|" + " ---: |" * 7,
        f"| {len(rows)} | {len(changed)} | {verdicts['faster']} | {verdicts['within noise']} | "
        f"{faults['slower']} | {faults['larger']} | {faults['further off']} |",
        "",
        "| graph | layers replaced | rel-error | bytes | speed-up (95%) | verdict |",
        "| ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {row.seed} | {row.replaced} of {row.layers} | {row.rel_error:.3f} | "
        f"{row.bytes[0]:,} → {row.bytes[1]:,} | {row.speed.speedup:.2f}× "
        f"({row.speed.low:.2f} to {row.speed.high:.2f}) | "
        f"{', '.join(row.faults) or row.speed.verdict} |"
        for row in rows
        if row.replaced or row.faults
    ]
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@click.option("--count", type=click.IntRange(1), default=100, help="Graphs.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the first graph.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
def main(out: Path, count: int, seed: int, markdown: Path | None) -> None:
    """Optimize random graphs, and time what was written anew."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(seed, seed + count):
        rows.append(check(number, out))
        click.echo(f"{number}: {rows[-1].replaced} replaced, {rows[-1].speed.speedup:.2f}×")
    tell_table(table(rows), markdown)
    if any(row.faults for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
