"""Models that never end, crash the runtime or ask for all memory, and the trials that notice."""

import os
import signal
import time
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxlr
from onnxlr.errors import CrashError, ModelError
from onnxlr.model.load import load
from onnxlr.prepare import shapes
from onnxlr.system import deadline, trial
from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.system.trial import Trial
from tests.support.builders import abort
from tests.support.hostile_seeds import SEEDS, mlp
from tests.support.refusals import refusal_of

pytestmark = pytest.mark.usefixtures("trials")


def _endless() -> onnx.ModelProto:
    model = SEEDS["loop"]()
    (times,) = (t for t in model.graph.initializer if t.name == "times")
    times.raw_data = np.int64(2**62).tobytes()
    return model


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["optimize in.onnx out.onnx", "bench in.onnx"])
def test_a_model_without_end(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, "1.5")
    onnx.save(_endless(), "in.onnx")
    started = time.monotonic()
    line = refusal_of(command)
    assert "in.onnx in ONNX Runtime takes more than 2 s" in line
    assert "ONNXLR_TRIAL=600" in line
    assert time.monotonic() - started < 30


def _endless_at(sample: int) -> tuple[onnx.ModelProto, np.ndarray[Any, Any]]:
    """A loop that goes on as long as its input says, and samples of which one says: for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["going"]),
            helper.make_node("Relu", ["v"], ["w"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 24]),
        ],
        [
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [1, 24]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["times"], to=TensorProto.INT64),
        helper.make_node("MatMul", ["x", "m"], ["h"]),
        helper.make_node("Loop", ["times", "", "h"], ["y"], body=body),
    ]
    weight = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 24])],
        [onnx.numpy_helper.from_array(weight, "m")],
    )
    x = np.ones((8, 1, 24), np.float32)
    x[sample] = 1e18
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), x


def test_shapes_are_not_observed_at_any_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that runs may crash the runtime once it has more outputs."""
    monkeypatch.delenv(deadline.TRIAL_VARIABLE, raising=False)
    model, x = _endless_at(0)
    graph = load(model).model
    assert shapes.observe_shapes(graph, ["h"], {"x": x[1]}, ONE_CPU_THREAD) == {"h": (1, 24)}
    monkeypatch.setattr(shapes, "_observe", abort)
    assert shapes.observe_shapes(graph, ["h"], {"x": x[1]}, ONE_CPU_THREAD) == {}


def test_what_is_timed_is_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may have an end where it is tried, and none on a later run: by chance, say."""
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, "2")
    model, x = _endless_at(0)
    session = Session(model.SerializeToString(), ONE_CPU_THREAD, "the model")
    session.bind({"x": x[1]})()
    for _ in range(2):
        with pytest.raises(CrashError, match="the model ran for 2 s on these inputs"):
            session.bind({"x": x[0]})()


@pytest.mark.usefixtures("here")
def test_a_model_without_end_on_one_sample_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, "3")
    model, x = _endless_at(5)
    onnx.save(model, "in.onnx")
    np.savez("data.npz", x=x[:, 0])
    started = time.monotonic()
    line = refusal_of("optimize in.onnx out.onnx --data data.npz --metric rel-error")
    assert "it may have no end" in line or "takes more than" in line
    assert time.monotonic() - started < 40


@pytest.mark.usefixtures("here")
def test_a_model_that_asks_for_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "available_memory", lambda: 1 << 20)
    model = SEEDS["shapes"]()
    (size,) = (t for t in model.graph.initializer if t.name == "size")
    size.raw_data = np.array([2**20, 2**20], np.int64).tobytes()
    onnx.save(model, "in.onnx")
    line = refusal_of("optimize in.onnx out.onnx")
    assert "2.1 GB of memory" in line


def _crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_model_that_crashes_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_run_session", _crash)
    with pytest.raises(CrashError, match="opening <model> crashes ONNX Runtime"):
        onnxlr.bench(mlp())


def test_a_trial_tells_what_fails_and_goes_on() -> None:
    with Trial(mlp().SerializeToString(), ONE_CPU_THREAD, "net", 4000) as tried:
        with pytest.raises(ModelError, match=r"net fails on inputs x float32\[2, 23\]"):
            tried.run({"x": np.zeros((2, 23), np.float32)})
        tried.run({"x": np.zeros((2, 24), np.float32)})
    with (
        Trial(b"no model", ONE_CPU_THREAD, "net", 8) as tried,
        pytest.raises(ModelError, match="can't open net"),
    ):
        tried.open()


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "1e9"])
def test_a_trial_of_no_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, text)
    with pytest.raises(onnxlr.UsageError, match="neither off nor a number"):
        onnxlr.bench(mlp())


def test_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.TRIAL_VARIABLE, "off")
    monkeypatch.setattr(trial, "run_in_sandbox", None)
    assert onnxlr.bench(mlp(), seconds=0.05).a.median_ms > 0
