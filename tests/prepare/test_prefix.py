"""Runs that begin at earlier values give what runs from the inputs give, with fewer nodes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxlr.model.load import load
from onnxlr.prepare import prefix
from onnxlr.prepare.inputs import input_specs
from onnxlr.prepare.opening import session_of_values
from onnxlr.prepare.prefix import Prefix, cut, most_samples
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.prepare.samples import Samples, load_samples
from onnxlr.system.session import ONE_CPU_THREAD
from tests.support.builders import make_model, node

RNG = np.random.default_rng(0)
LAYERS = 6


def residual() -> onnx.ModelProto:
    """Six MatMuls in three residual blocks, of which a Split and a Concat are part."""
    nodes, weights, x = [], {}, "x"
    for i in range(0, LAYERS, 2):
        for k in (i, i + 1):
            weights[f"w{k}"] = RNG.standard_normal((8, 8)).astype(np.float32) / 3
        nodes += [
            node("MatMul", [x, f"w{i}"], f"a{i}"),
            onnx.helper.make_node("Split", [f"a{i}"], [f"b{i}", f"c{i}"], axis=1),
            node("Tanh", [f"b{i}"], f"d{i}"),
            node("Concat", [f"d{i}", f"c{i}"], f"e{i}", axis=1),
            node("MatMul", [f"e{i}", f"w{i + 1}"], f"f{i}"),
            node("Add", [f"f{i}", x], f"y{i}"),
        ]
        x = f"y{i}"
    return make_model(nodes, {"x": (1, 8)}, [x], weights)


@pytest.fixture
def prepared() -> Prepared:
    return prepare(load(residual()), feed={"x": np.zeros((1, 8), np.float32)})


@pytest.fixture
def samples(tmp_path: Path, prepared: Prepared) -> Samples:
    np.savez(tmp_path / "d.npz", x=RNG.standard_normal((7, 8)).astype(np.float32))
    return load_samples(tmp_path / "d.npz", input_specs(prepared.model), None)


def changed(prepared: Prepared, layers: int) -> Any:
    """The model with the weights of its first layers doubled."""
    model = prepared.model.clone()
    for i in range(layers):
        value = model.graph.initializers[f"w{i}"]
        assert value.const_value is not None
        value.const_value = ir.tensor(2 * value.const_value.numpy(), name=value.name)
    return model


@pytest.mark.parametrize("most", [0, 500, 1 << 20])
def test_they_are_those_of_the_whole_model(
    prepared: Prepared, samples: Samples, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    sizes = []

    def watched(graph: Any, *rest: Any) -> Any:
        begins = cut(graph, *rest)
        sizes.append(len(graph.node))
        return begins

    monkeypatch.setattr(prefix, "cut", watched)
    runs = Prefix(prepared.source, samples, most)
    for i in range(LAYERS):
        (name,) = {"x" if i == 0 else f"e{i - 1}" if i % 2 else f"y{i - 2}"}
        model = changed(prepared, i)
        whole = session_of_values(model, {name}, ONE_CPU_THREAD, prepared.source)
        for feed, values in runs.values(model, {name}, {name}):
            expected = dict(feed) | whole.run(feed)
            np.testing.assert_allclose((dict(feed) | values)[name], expected[name], rtol=1e-5)
    from_the_input = [4, 6, 10, 12, 16]
    assert sizes == (from_the_input if most == 0 else [4, 2, 4, 2, 4])


def test_a_value_that_is_not_kept_is_run_anew(prepared: Prepared, samples: Samples) -> None:
    runs = Prefix(prepared.source, samples)
    for layers in (0, 1):
        model = changed(prepared, layers)
        whole = session_of_values(model, {"e0"}, ONE_CPU_THREAD, prepared.source)
        for feed, values in runs.values(model, {"e0"}, ()):
            np.testing.assert_allclose(values["e0"], whole.run(feed)["e0"], rtol=1e-5)


def test_an_iteration_that_was_left_keeps_nothing(prepared: Prepared, samples: Samples) -> None:
    runs = Prefix(prepared.source, samples)
    next(runs.values(prepared.model, {"e0"}, {"e0"}))
    both = zip(
        runs.values(prepared.model, {"e0"}, {"e0"}),
        runs.values(prepared.model, {"e0"}, {"e0"}),
        strict=True,
    )
    assert len(list(both)) == 7


def test_a_node_that_gives_another_output_too_is_not_cut_off() -> None:
    graph = residual().graph
    types = {name: np.dtype(np.float32) for name in ("b0", "d0")}
    assert cut(graph, ["e0"], types) == {"d0"}  # c0 comes from the node that gives b0
    assert [n.op_type for n in graph.node] == ["MatMul", "Split", "Concat"]
    assert {v.name for v in graph.input} == {"x", "d0"}
    assert [t.name for t in graph.initializer] == ["w0"]
    graph = residual().graph
    assert cut(graph, ["y0"], {"b0": types["b0"]}) == set()


def test_what_a_body_reads_is_needed() -> None:
    branch = onnx.helper.make_graph(
        [node("Add", ["h", "h"], "z")],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)],
    )
    choice = onnx.helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch)
    model = make_model(
        [node("MatMul", ["x", "w"], "h"), node("Tanh", ["x"], "unneeded"), choice],
        {"x": (1, 2), "c": ()},
        ["h"],
        {"w": np.eye(2, dtype=np.float32)},
    )
    cut(model.graph, ["o"], {})
    assert [n.op_type for n in model.graph.node] == ["MatMul", "If"]
    assert {v.name for v in model.graph.input} == {"x", "c"}


def test_no_more_samples_than_their_values_have_room() -> None:
    for batch in (1, 4):
        nodes = [node("MatMul", ["x", "w"], "h"), node("MatMul", ["h", "v"], "y")]
        weights = {"w": np.ones((8, 1024), np.float32), "v": np.ones((1024, 2), np.float32)}
        model = make_model(nodes, {"x": (batch, 16, 8)}, ["y"], weights)
        prepared = prepare(load(model), feed={"x": np.zeros((batch, 16, 8), np.float32)})
        first, second = (layer.name for layer in prepared.layers)
        assert most_samples(prepared, {first}) == (512 << 20) // (2 * 4 * 16 * 8)
        assert most_samples(prepared, {first, second}) == (512 << 20) // (2 * 4 * 16 * 1024)
