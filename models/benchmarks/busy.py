"""Check that a busy machine decides as a quiet one does, or says what it can't decide.

``python -m models.benchmarks.busy --out FOLDER`` optimizes the two shipped models on their samples,
some times on the machine as it is (which should be quiet) and as often beside busy loops, twice as
many as there are cores. No run finds latencies of another; what else is computed is kept, and
sequential correction, which takes longest and in which nothing is timed, is left out. A run
agrees if it replaces and keeps the layers that most quiet runs replace and keep. A layer that it
keeps and they replace has to say that it could not be decided. After each run under load the shared
table of latencies must have none of its timings. It ends with an error if fewer than nine of ten
runs under load agree or say so, or if a timing of theirs was left.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

import onnxlr
from models.reference.files import tell_table
from onnxlr.plan.plan import KEEP
from onnxlr.system.cache import FOLDER_VARIABLE

MODELS = ("fashion-mlp.onnx", "fashion-cnn.onnx")
_HERE = Path(__file__).parent.parent
_SHARE = 0.9  # of the runs under load have to agree, or to say that they couldn't decide
_SETTLING = 2.0  # seconds until a load, or its end, is felt


@dataclass(frozen=True)
class Run:
    """What one run came to.

    Attributes
    ----------
    loaded : bool
        Whether the machine was kept busy meanwhile.
    replaced : frozenset of str
        Names of the replaced layers.
    speedup : float
    busy : float
        Share of the time of the final comparison that was spent waiting for other processes.
    undecided : frozenset of str
        Names of the layers that it kept because it could not decide.
    lines : tuple of str
        What it said of the busy machine.
    left : int
        Timings that it left for later runs.
    seconds : float
    """

    loaded: bool
    replaced: frozenset[str]
    speedup: float
    busy: float
    undecided: frozenset[str]
    lines: tuple[str, ...]
    left: int
    seconds: float


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep so many processes busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(_SETTLING)
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()
        time.sleep(_SETTLING)


def count_timings(cache: Path) -> int:
    """Count the latencies in a cache folder."""
    tables = [json.loads(path.read_text()) for path in cache.glob("latency-*.json")]
    return sum(
        len(ranks)
        for table in tables
        for methods in table["times"].values()
        for ranks in methods.values()
    )


def forget_timings(cache: Path) -> None:
    """Delete the latencies in a cache folder, and nothing else."""
    for path in cache.glob("latency-*.json"):
        path.unlink()


def optimize(model: str, cache: Path, *, loaded: bool) -> Run:
    """Optimize a shipped model on its samples, without kept latencies."""
    forget_timings(cache)
    started = time.perf_counter()
    report = onnxlr.optimize(
        _HERE / model,
        data=_HERE / "fashion-samples.npz",
        labels="label",
        without="sequential",
    ).report
    speed = report.speed
    lines = tuple(note for note in report.notes if "other process" in note)
    return Run(
        loaded,
        frozenset(d.name for d in report.decisions if d.decision != KEEP),
        1.0 if speed is None else speed.speedup,
        0.0 if speed is None else speed.busy,
        frozenset(d.name for d in report.decisions if d.decision == KEEP and _is_open(d.reason)),
        lines,
        count_timings(cache),
        time.perf_counter() - started,
    )


def _is_open(reason: str) -> bool:
    return "undecided" in reason or "decides nothing" in reason


def usual(runs: list[Run]) -> frozenset[str]:
    """Return what most of the quiet runs replace."""
    return Counter(run.replaced for run in runs if not run.loaded).most_common(1)[0][0]


def says_so(run: Run, expected: frozenset[str]) -> bool:
    """Whether a run kept every layer that it should have replaced because it could not decide."""
    return run.replaced != expected and run.replaced | run.undecided >= expected >= run.replaced


def faults(runs: list[Run]) -> list[str]:
    """List what the runs of a model broke."""
    busy = [run for run in runs if run.loaded]
    expected = usual(runs)
    fine = sum(run.replaced == expected or says_so(run, expected) for run in busy)
    left = sum(run.left for run in busy)
    return [
        *([f"only {fine} of {len(busy)} agree or say so"] if fine < _SHARE * len(busy) else []),
        *([f"{left} timings of the busy machine were left"] if left else []),
    ]


def table(results: dict[str, list[Run]]) -> list[str]:
    """Return a line for each model on each machine, what was said, and the faults."""
    lines = [
        "| model | machine | runs | same layers | said undecided | speed-up | waited | "
        "timings left | s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, runs in results.items():
        for loaded in (False, True):
            some = [run for run in runs if run.loaded == loaded]
            agree = sum(run.replaced == usual(runs) for run in some)
            said = sum(says_so(run, usual(runs)) for run in some)
            ratios = sorted(run.speedup for run in some)
            lines.append(
                f"| {model} | {'busy' if loaded else 'quiet'} | {len(some)} | {agree} | "
                f"{said} | {ratios[0]:.2f}× to {ratios[-1]:.2f}× | "
                f"{max(run.busy for run in some):.0%} | {sum(run.left for run in some)} | "
                f"{sum(run.seconds for run in some) / len(some):.0f} |"
            )
    told = {line for runs in results.values() for run in runs for line in run.lines}
    broken = [f"{model}: {fault}" for model, runs in results.items() for fault in faults(runs)]
    return [*lines, "", *(f"- {line}" for line in (*sorted(told), *broken))]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the cache.")
@click.option("--runs", type=click.IntRange(1), default=10, help="Of each model, each way.")
@click.option("--times", type=float, default=2.0, help="Busy loops for each core.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
def main(out: Path, runs: int, times: float, markdown: Path | None) -> None:
    """Optimize the shipped models on a quiet and on a busy machine."""
    os.environ[FOLDER_VARIABLE] = str(out)
    loops = round(times * (os.cpu_count() or 1))
    results: dict[str, list[Run]] = {}
    for model in MODELS:
        done = results[model] = []
        for loaded in (False, True):
            with load(loops if loaded else 0):
                for _ in range(runs):
                    done.append(run := optimize(model, out, loaded=loaded))
                    click.echo(
                        f"{model}, {'busy' if loaded else 'quiet'}: "
                        f"{', '.join(sorted(run.replaced)) or 'no gain'}, {run.speedup:.2f}×"
                    )
    tell_table(table(results), markdown)
    if any(faults(done) for done in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
