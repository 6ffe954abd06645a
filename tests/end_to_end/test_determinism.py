"""The same command gives the same bytes, whatever else is different around it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxlr.plan.plan import Plan
from tests.support.limits import SHORT, code_of
from tests.support.networks import images, network

MODELS = Path(__file__).parent.parent.parent / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(network(), tmp_path / "net.onnx")
    np.savez(tmp_path / "d.npz", x=images(96, 0))
    return tmp_path


def optimized(
    folder: Path,
    name: str,
    flags: list[str],
    environment: dict[str, str],
    source: Path | None = None,
    before: str = "",
) -> tuple[bytes, Plan]:
    """The file and the plan of a command in a new process."""
    out, plan = folder / f"{name}.onnx", folder / f"{name}.json"
    tool = [
        sys.executable,
        "-c",
        f"{code_of(SHORT)}\n{before}\nfrom onnxlr.cli.commands import main; main()",
    ]
    subprocess.run(
        [
            *(*tool, "optimize", str(source or folder / "net.onnx"), str(out)),
            *("--plan-out", str(plan), "--quiet", *flags),
        ],
        env=os.environ | environment,
        check=True,
    )
    return out.read_bytes(), Plan.from_json(plan.read_text(), str(plan))


# Every layer is faster, by as much as chance will have it: what is timed again comes out otherwise.
LUCKY_CLOCK = """
import random
from onnxlr.plan import evaluate
from onnxlr.verify import layer_latency
from onnxlr.verify.latency import Comparison, Timing
def faster(*_, **__):
    ratio = random.uniform(1.5, 9.0)
    after = Timing(*[1 / ratio] * 3)
    return Comparison(Timing(1.0, 1.0, 1.0), after, 9, ratio, 0.99 * ratio, 1.01 * ratio)
evaluate.compare_sessions = layer_latency.timed_apart = faster
"""

ODD = {
    "threads of linear algebra": {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    "hashes of strings": {"PYTHONHASHSEED": "77"},
    "no cache": {"ONNXLR_CACHE": "off"},
}


def test_the_same_bytes_within_a_budget_whatever_is_around(folder: Path) -> None:
    """Nothing is timed that could choose: the file follows from the model and the samples."""
    budget = ["--target", "macs=0.6", "--max-drop", "1", "--metric", "rel-error"]
    budget += ["--data", str(folder / "d.npz")]
    first = optimized(folder, "first", budget, {"PYTHONHASHSEED": "1"})
    again = optimized(folder, "again", budget, {"PYTHONHASHSEED": "1"})
    assert again == first
    for name, environment in ODD.items():
        assert optimized(folder, "odd", budget, environment) == first, name


def test_the_same_plan_from_the_same_latencies_with_other_threads(
    folder: Path, few_images: Path
) -> None:
    """A table that one thread has measured decides for two as it did for one."""
    source = MODELS / "fashion-mlp.onnx"
    table = ["--latency-table", str(folder / "table.json"), "--data", str(few_images)]
    table += ["--labels", "label", "--max-drop", "0.05"]
    written, plan = optimized(folder, "one", table, {}, source, LUCKY_CLOCK)
    assert plan.replaced
    for threads in ("1", "2"):
        more = [*table, "--threads", threads]
        again, same = optimized(folder, f"with{threads}", more, {}, source, LUCKY_CLOCK)
        assert [d.name for d in same.replaced] == [d.name for d in plan.replaced]
        assert [(d.decision, d.rank) for d in same.decisions] == [
            (d.decision, d.rank) for d in plan.decisions
        ]
        assert again == written
