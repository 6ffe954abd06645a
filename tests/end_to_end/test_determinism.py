"""The same command gives the same bytes, whatever else is different around it."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import SystemRandom

import numpy as np
import onnx
import pytest

from onnxlr.plan.plan import Plan
from onnxlr.verify.latency import Comparison, Timing
from tests.support import commands
from tests.support.limits import SHORT, code_of
from tests.support.networks import images, network

# Every stage runs, on less.
EFFORT = replace(SHORT, ranks=3, fit_samples=64, sequence_samples=48, rungs=3)

MODELS = Path(__file__).parent.parent.parent / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(network(), tmp_path / "net.onnx")
    np.savez(tmp_path / "d.npz", x=images(96, 0))
    return tmp_path


@dataclass(frozen=True)
class Run:
    """A command, up to what it writes.

    Attributes
    ----------
    folder : Path
        Where its files go.
    flags : tuple of str
    source : Path
    """

    folder: Path
    flags: tuple[str, ...]
    source: Path

    def command(self, name: str) -> list[str]:
        out, plan = self.folder / f"{name}.onnx", self.folder / f"{name}.json"
        words = ("optimize", str(self.source), str(out), "--plan-out", str(plan), "--quiet")
        return [*words, *self.flags]

    def written(self, name: str) -> tuple[bytes, Plan]:
        """The file and the plan."""
        out, plan = self.folder / f"{name}.onnx", self.folder / f"{name}.json"
        return out.read_bytes(), Plan.from_json(plan.read_text(), str(plan))

    def optimized(self, name: str, *more: str, **patches: object) -> tuple[bytes, Plan]:
        """What the command writes in a process of its own, with further flags."""
        done = commands.run(
            *(*self.command(name), *more),
            entry=commands.UNWATCHED,
            patches={"onnxlr.api.functions.LIMITS": EFFORT, **patches},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return self.written(name)

    def optimized_anew(self, name: str, environment: dict[str, str]) -> tuple[bytes, Plan]:
        """What it writes in a new interpreter, whose environment is another."""
        code = f"{code_of(EFFORT)}\nfrom onnxlr.cli.commands import main; main()"
        subprocess.run(
            [sys.executable, "-c", code, *self.command(name)],
            env=os.environ | environment,
            check=True,
        )
        return self.written(name)


def lucky(*_: object, **__: object) -> Comparison:
    """Every layer is faster, by as much as chance will have it, in each process anew."""
    ratio = SystemRandom().uniform(1.5, 9.0)
    after = Timing(*[1 / ratio] * 3)
    return Comparison(Timing(1.0, 1.0, 1.0), after, 9, ratio, 0.99 * ratio, 1.01 * ratio)


# What is timed again comes out otherwise.
LUCKY_CLOCK = dict.fromkeys(
    ("onnxlr.plan.evaluate.compare_sessions", "onnxlr.verify.layer_latency.timed_apart"), lucky
)

# Threads of linear algebra, and hashes of strings: an interpreter learns of them as it starts.
ODD = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONHASHSEED": "77"}


@pytest.mark.parametrize("methods", [("svd", "channel-svd", "tucker2"), ("interpolative",)])
def test_the_same_bytes_within_a_budget_whatever_is_around(
    folder: Path, methods: tuple[str, ...]
) -> None:
    """Nothing is timed that could choose: the file follows from the model and the samples."""
    budget = ("--target", "macs=0.6", "--max-drop", "1", "--metric", "rel-error")
    named = (f"--method={name}" for name in methods)
    run = Run(folder, (*budget, *named, "--data", str(folder / "d.npz")), folder / "net.onnx")
    first = run.optimized("first")
    assert first[1].widths.kept if methods == ("interpolative",) else first[1].replaced
    assert run.optimized("again") == first
    for cache in ({}, {"ONNXLR_CACHE": "off"}):
        assert run.optimized_anew("odd", ODD | cache) == first, cache


def test_the_same_plan_from_the_same_latencies_with_other_threads(
    folder: Path, few_images: Path
) -> None:
    """A table that one thread has measured decides for two as it did for one."""
    table = ("--latency-table", str(folder / "table.json"), "--data", str(few_images))
    flags = (*table, "--labels", "label", "--max-drop", "0.05", "--include", r"hidden\.[12]\.")
    run = Run(folder, flags, MODELS / "fashion-mlp.onnx")
    written, plan = run.optimized("one", **LUCKY_CLOCK)
    assert plan.replaced
    for threads in ("1", "2"):
        again, same = run.optimized(f"with{threads}", "--threads", threads, **LUCKY_CLOCK)
        assert [d.name for d in same.replaced] == [d.name for d in plan.replaced]
        assert [(d.decision, d.rank) for d in same.decisions] == [
            (d.decision, d.rank) for d in plan.decisions
        ]
        assert again == written
