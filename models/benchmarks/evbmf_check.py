"""Compares EVBMF with a global minimiser on a dense grid, on many seeded matrices.

``python -m models.benchmarks.evbmf_check --count 10000`` prints every disagreement and ends with 1
if there is one. The test suite does the first 200.
"""

import sys
import time

import click
from rich.progress import track

from tests.decompose.evbmf_oracle import disagreement, random_matrix


@click.command()
@click.option("--count", default=10_000, show_default=True, help="Matrices to check.")
@click.option("--first", default=0, show_default=True, help="Seed of the first.")
def main(count: int, first: int) -> None:
    """Check seeds FIRST to FIRST + COUNT - 1."""
    started, wrong = time.perf_counter(), 0
    for seed in track(range(first, first + count), description="matrices"):
        reason = disagreement(random_matrix(seed))
        if reason is not None:
            wrong += 1
            click.echo(f"seed {seed}: {reason}")
    minutes = (time.perf_counter() - started) / 60
    click.echo(f"{count} matrices, {wrong} disagreements, {minutes:.1f} min")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
