"""Samples and models that are handed over in memory."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import onnxlr
from onnxlr.errors import DataError, UsageError
from onnxlr.model.load import load
from onnxlr.prepare.inputs import input_specs
from onnxlr.prepare.samples import load_samples
from onnxlr.system.in_memory import as_data
from tests.support.builders import linear

WEIGHT = np.random.default_rng(0).standard_normal((12, 64)).astype(np.float32)


def rows(count: int, first: int = 0) -> NDArray[np.float32]:
    return np.arange(first * 12, (first + count) * 12, dtype=np.float32).reshape(count, 12)


def batches() -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """As a loader gives them, the last one smaller."""
    for first, count in ((0, 4), (4, 4), (8, 2)):
        yield rows(count, first), np.arange(first, first + count)


class Tensor:
    """An array of another library."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        return self.array


@pytest.mark.parametrize(
    "data",
    [
        {"x": rows(10)},
        {"x": rows(10), "label": np.arange(10)},
        rows(10),
        Tensor(rows(10)),
        [{"x": rows(6)}, {"x": rows(4, 6)}],
        [rows(6), rows(4, 6)],
        [(Tensor(rows(10)), np.arange(10))],
        batches(),
    ],
    ids=["dict", "labels", "array", "tensor", "dicts", "arrays", "tensors", "loader"],
)
def test_samples_are_those_of_a_file(tmp_path: Path, data: Any) -> None:
    specs = input_specs(load(linear(WEIGHT, rows="n")).model)
    path = tmp_path / "samples.npz"
    np.savez(path, x=rows(10))
    samples, expected = as_data(data), load_samples(path, specs, None)
    assert samples is not None
    assert load_samples(samples, specs, None).digest() == expected.digest()


def test_labels_come_behind_the_inputs() -> None:
    specs = input_specs(load(linear(WEIGHT, rows="n")).model)
    data = as_data(batches())
    assert data is not None
    labels = load_samples(data, specs, "label").labels
    assert labels is not None
    assert labels.tolist() == list(range(10))


def test_samples_of_other_shapes_are_kept_apart() -> None:
    """A loader may pad each batch as it needs: no run mixes them."""
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, ["n", "length"])],
            [onnx.helper.make_tensor_value_info("y", 1, None)],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
    )
    data = as_data([np.ones((3, 5), "f4"), np.ones((2, 7), "f4"), np.ones((3, 5), "f4")])
    assert data is not None
    samples = load_samples(data, input_specs(load(model).model), None)
    assert [feed["x"].shape for feed, _, _ in samples.batches()] == [(6, 5), (2, 7)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3.5, "samples of type float can't be read: give a path, a dict of arrays"),
        ([], "the iterable of samples is empty"),
        (np.float32(1), "have no axis of samples"),
        ([3, 4], "have no axis of samples"),
        ([(rows(2),) * 3], "a batch of the samples holds 3 arrays, the model takes 1"),
        ({"z": rows(4)}, "the data has no array 'x' for the input x"),
        ({"x": rows(4).astype(np.float64)}, "'x' is float64, the model takes float32"),
        ({"x": np.array([object()])}, "'x' is text, the model takes float32"),
    ],
)
def test_what_is_no_sample_is_said(data: Any, message: str) -> None:
    with pytest.raises(DataError, match="(?s).*" + message.replace("(", r"\(")):
        onnxlr.optimize(linear(WEIGHT), data=data)


def test_a_run_on_arrays_is_that_on_their_file(tmp_path: Path) -> None:
    samples = np.random.default_rng(1).standard_normal((96, 12)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=samples)
    options: dict[str, Any] = {"rank": 3, "max_drop": 1, "measure": False}
    model = linear(WEIGHT, rows="n")
    here = onnxlr.optimize(model, data={"x": samples}, **options)
    there = onnxlr.optimize(model, data=tmp_path / "samples.npz", **options)
    assert here.model == there.model
    assert onnxlr.apply(here.plan, model, data=samples) == here.model
    with pytest.raises(UsageError, match="name the samples with --data"):
        onnxlr.apply(here.plan, model)


class Program:
    """What torch's exporter returns, as far as it is looked at."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model_proto = model


class Graph:
    """A graph of ONNX GraphSurgeon, as far as it is looked at."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model


def test_models_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    surgeon: Any = ModuleType("onnx_graphsurgeon")
    surgeon.Graph, surgeon.export_onnx = Graph, lambda graph: graph.model
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", surgeon)
    model = linear(WEIGHT)
    expected = {layer.layer.name for layer in onnxlr.inspect(model)}
    for other in (ir.from_proto(model), Program(model), Graph(model)):
        assert {layer.layer.name for layer in onnxlr.inspect(other)} == expected
        assert len(onnxlr.optimize(other, rank=2, verify="none").plan.replaced) == 1


def test_what_is_no_model_is_said() -> None:
    with pytest.raises(UsageError, match="a model of type dict can't be read: give a path"):
        onnxlr.inspect({"a": 1})
