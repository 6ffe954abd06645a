"""Where models are judged: on every core if that pays, while speed is measured as named."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.model.load import load
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.system.session import ONE_CPU_THREAD, Machine, Session
from onnxlr.verify import examination, latency
from onnxlr.verify.examination import judging_machine
from onnxlr.verify.judge import Judge
from tests.support.builders import linear, make_model, node
from tests.support.limits import FEW
from tests.support.networks import images, network

CORES = 5


@pytest.fixture(autouse=True)
def _cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "usable_cores", lambda: CORES)


def convolution(pixels: int) -> Prepared:
    """32 channels to 32, 3 × 3, over a square of so many pixels a side."""
    weight = np.zeros((32, 32, 3, 3), np.float32)
    nodes = [node("Conv", ["x", "w"], "y", pads=[1, 1, 1, 1])]
    return prepare(
        load(make_model(nodes, {"x": (1, 32, pixels, pixels)}, ["y"], {"w": weight})), feed=None
    )


HEAVY, LIGHT = 160, 4  # pixels a side: 236 million multiply-accumulates, and 147 thousand


def test_heavy_models_are_judged_on_every_core() -> None:
    assert judging_machine(convolution(HEAVY), ONE_CPU_THREAD) == Machine(threads=CORES)
    assert judging_machine(convolution(LIGHT), ONE_CPU_THREAD) == ONE_CPU_THREAD


@pytest.mark.parametrize(("cores", "threads", "expected"), [(64, 1, 8), (64, 16, 16), (1, 1, 1)])
def test_threads_that_are_named_are_not_fewer(
    cores: int, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "usable_cores", lambda: cores)
    heavy = convolution(HEAVY)
    assert judging_machine(heavy, Machine(threads=threads)) == Machine(threads=expected)


def test_providers_that_compile_judge_what_they_compiled() -> None:
    compiled = Machine("openvino")
    assert judging_machine(convolution(HEAVY), compiled) == compiled


def test_a_large_model_is_not_opened_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_WORTH_THREADS", 0.0)
    prepared = prepare(load(linear(np.ones((64, 32), np.float32))), feed=None)
    assert judging_machine(prepared, ONE_CPU_THREAD).threads == CORES
    monkeypatch.setattr(examination, "_SMALL", 2 * 4 * 64 * 32 - 1)
    assert judging_machine(prepared, ONE_CPU_THREAD) == ONE_CPU_THREAD


@pytest.mark.parametrize("target", ["latency", "macs=0.6"])
def test_speed_is_measured_on_the_threads_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    judged: list[int] = []
    timed: list[int] = []
    judge, compare = Judge.judge, latency.compare_sessions

    def judging(self: Judge, candidate: Session, *more: Any) -> Any:
        if self.metric == "cosine":  # and not the sensitivities
            judged.extend((self.original.machine.threads, candidate.machine.threads))
        return judge(self, candidate, *more)

    def comparing(a: Session, b: Session, *more: Any) -> Any:
        timed.extend((a.machine.threads, b.machine.threads))
        return compare(a, b, *more)

    monkeypatch.setattr(Judge, "judge", judging)
    monkeypatch.setattr("onnxlr.plan.evaluate.compare_sessions", comparing)
    monkeypatch.setattr(examination, "_WORTH_THREADS", 0.0)
    monkeypatch.setattr("onnxlr.api.functions.LIMITS", FEW)
    onnx.save(network(), tmp_path / "net.onnx")
    options: dict[str, Any] = {"metric": "cosine", "max_drop": 0.5, "target": target, "threads": 2}
    result = onnxlr.optimize(tmp_path / "net.onnx", data={"x": images(96, 0)}, **options)
    assert set(judged) == {CORES}
    assert set(timed) == {2}
    assert result.report.speed is not None
    assert result.report.machine.threads == 2


def test_an_original_that_is_handed_over_is_itself_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(examination, "_WORTH_THREADS", 0.0)
    onnx.save(network(), tmp_path / "net.onnx")
    options: dict[str, Any] = {"metric": "cosine", "max_drop": 1e-9}
    result = onnxlr.optimize(tmp_path / "net.onnx", data={"x": images(96, 0)}, **options)
    assert result.report.verdict.startswith("no gain")
    assert result.report.quality is not None
    assert result.report.quality.fidelity.rel_error == 0.0
