"""input-svd: a product in front of recurrent and attention operators, with a narrower weight."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxlr
from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.fitting import (
    THOROUGH,
    closed_errors,
    fit_to_inputs,
    output_error,
    rest_of,
)
from onnxlr.layers.kernel import as_matrix
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import count_macs
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.cost import chain_macs, chain_params
from onnxlr.methods.registry import find_pass
from onnxlr.model.protobuf import to_proto
from onnxlr.rewrite.replace import rewrite
from onnxlr.types import Rank
from tests.support.builders import Array, layers_of, low_rank, make_model, node, relative, run

METHOD = find_pass("input-svd")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
TIME, BATCH, INPUTS, STATE = 6, 3, 10, 5


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def recurrent(
    op: str,
    *,
    direction: str = "bidirectional",
    bias: bool = True,
    read: str = "y",
    rank: int = 0,
    **attributes: Any,
) -> onnx.ModelProto:
    directions = 2 if direction == "bidirectional" else 1
    gates = GATES[op] * STATE
    rows = directions * gates
    weight = low_rank(np.random.default_rng(1), rows, INPUTS, rank) if rank else rand(rows, INPUTS)
    weights = {
        "w": weight.reshape(directions, gates, INPUTS) / 2,
        "r": rand(directions, gates, STATE, seed=2) / 3,
    }
    if bias:
        weights["b"] = rand(directions, 2 * gates, seed=3)
    made = onnx.helper.make_node(
        op,
        ["x", "w", "r", *(["b"] if bias else [])],
        ["y", "last"] if read == "y" else ["", "last"],
        name="rnn",
        hidden_size=STATE,
        direction=direction,
        **attributes,
    )
    return make_model([made], {"x": (TIME, BATCH, INPUTS)}, [read], weights)


def attention(*, rank: int = 0) -> onnx.ModelProto:
    """ONNX Runtime's operator, of which this package of ONNX knows no shapes."""
    weight = low_rank(np.random.default_rng(1), INPUTS, 24, rank) if rank else rand(INPUTS, 24)
    weights = {"w": weight, "b": rand(24, seed=2)}
    made = onnx.helper.make_node(
        "Attention", ["x", "w", "b"], ["y"], name="attention", domain="com.microsoft", num_heads=2
    )
    model = make_model([node("Identity", ["x"], "y")], {"x": (BATCH, TIME, INPUTS)}, ["y"], weights)
    model.graph.node[0].CopyFrom(made)
    model.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (BATCH, TIME, 8))
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return model


MODELS = {
    "LSTM": recurrent("LSTM"),
    "LSTM forward": recurrent("LSTM", direction="forward", bias=False),
    "LSTM backward": recurrent("LSTM", direction="reverse", read="last"),
    "GRU": recurrent("GRU"),
    "GRU reset behind": recurrent("GRU", linear_before_reset=1, direction="forward"),
    "RNN": recurrent("RNN"),
    "Attention": attention(),
}


def the_layer(model: onnx.ModelProto) -> Layer:
    (layer,) = (a for a in layers_of(model)[2] if METHOD.refuse(a) is None)
    return layer


def factorized(
    model: onnx.ModelProto, rank: Rank | None = None, shift: Array | None = None
) -> onnx.ModelProto:
    """The model with the layer by input-svd, at full rank without one."""
    source, shapes, layers = layers_of(model)
    (layer,) = (a for a in layers if METHOD.refuse(a) is None)
    rank = rank or METHOD.full_rank(layer)
    factored = Factored(METHOD.factorize(layer, rank), shift)
    choices = {layer.name: Choice(METHOD, rank)}
    return to_proto(rewrite(source, shapes, choices, {layer.name: factored}))


def x_of(model: onnx.ModelProto, seed: int = 9) -> Array:
    return rand(*(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim), seed=seed)


@pytest.mark.parametrize("case", MODELS)
def test_it_is_exact_at_full_rank(case: str) -> None:
    model = MODELS[case]
    replaced = factorized(model)
    onnx.checker.check_model(replaced)
    assert [n.op_type for n in replaced.graph.node] == ["MatMul", model.graph.node[0].op_type]
    assert list(replaced.graph.node[1].output) == list(model.graph.node[0].output)
    x = x_of(model)
    assert relative(run(model, {"x": x})[0], run(replaced, {"x": x})[0]) < 1e-5


@given(st.sampled_from(["LSTM", "GRU", "RNN", "Attention"]), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_planted_rank_is_exact(op: str, rank: int, seed: int) -> None:
    model = attention(rank=rank) if op == "Attention" else recurrent(op, rank=rank)
    replaced = factorized(model, (rank,))
    x = x_of(model, seed)
    assert relative(run(model, {"x": x})[0], run(replaced, {"x": x})[0]) < 1e-4


def test_two_operators_with_one_weight_get_a_product_each() -> None:
    weights = {"w": rand(1, 20, INPUTS), "r": rand(1, 20, STATE, seed=2)}
    nodes = [
        node("LSTM", [x, "w", "r"], y, f"rnn {x}", hidden_size=STATE)
        for x, y in (("x", "y1"), ("x2", "y2"))
    ]
    shape = (TIME, BATCH, INPUTS)
    model = make_model(nodes, {"x": shape, "x2": shape}, ["y1", "y2"], weights)
    replaced = factorized(model)
    feed = {"x": rand(*shape), "x2": rand(*shape, seed=5)}
    for before, after in zip(run(model, feed), run(replaced, feed), strict=True):
        assert relative(before, after) < 1e-5
    assert [n.op_type for n in replaced.graph.node] == ["MatMul", "LSTM", "MatMul", "LSTM"]
    assert {i.name for i in replaced.graph.initializer} == {"w/input_svd_0", "w/input_svd_1", "r"}


@pytest.mark.parametrize("case", MODELS)
def test_the_bias_inside_takes_up_the_shift(case: str) -> None:
    """As if each input's product had the shift: the inputs' biases come first in the operator's."""
    model = MODELS[case]
    layer = the_layer(model)
    shift = rand(as_matrix(layer, layer.array()).shape[1], seed=4).astype(np.float64)
    wanted = onnx.ModelProto()
    wanted.CopyFrom(model)
    old = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    if "Attention" in case:
        bias = old.get("b", np.zeros(24)) + shift
    else:
        directions, gates, _ = layer.shape
        bias = old.get("b", np.zeros((directions, 2 * gates))).astype(np.float64)
        bias[:, :gates] += shift.reshape(directions, gates)
    kept = [i for i in wanted.graph.initializer if i.name != "b"]
    del wanted.graph.initializer[:]
    wanted.graph.initializer.extend(
        [*kept, onnx.numpy_helper.from_array(bias.astype(np.float32), "b")]
    )
    inputs = [*model.graph.node[0].input[: 2 if "Attention" in case else 3], "b"]
    del wanted.graph.node[0].input[:]
    wanted.graph.node[0].input.extend(inputs)
    x = x_of(model)
    (expected,), (got,) = run(wanted, {"x": x}), run(factorized(model, shift=shift), {"x": x})
    assert relative(expected, got) < 1e-5


@pytest.mark.parametrize("case", MODELS)
def test_costs_are_those_of_what_is_written(case: str) -> None:
    model = MODELS[case]
    layer = the_layer(model)
    replaced = factorized(model, (3,))
    source, shapes, _ = layers_of(replaced)
    before, before_shapes, _ = layers_of(model)
    written = count_macs(source, shapes)
    rest = count_macs(before, before_shapes) - (layer.macs or 0)
    assert written - rest == chain_macs(layer, METHOD, (3,))
    stored = sum(int(np.prod(i.dims)) for i in replaced.graph.initializer if "svd" in i.name)
    assert stored == chain_params(layer, METHOD, (3,))
    positions = TIME * BATCH
    assert layer.macs == positions * layer.params


@pytest.mark.parametrize("case", ["LSTM", "GRU", "Attention"])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_factors_fitted_to_data_are_the_best_there_are(case: str, rank: int) -> None:
    layer = the_layer(MODELS[case])
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((300, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS))
    rows *= np.geomspace(1, 0.1, INPUTS)
    covariance = np.cov(rows.T, bias=True)
    statistics = Statistics(rows.mean(axis=0)[None], covariance[None], 300)
    weight = as_matrix(layer, layer.array())[0]
    values, vectors = np.linalg.eigh(covariance)
    u = np.linalg.svd(weight @ (vectors * np.sqrt(values)))[0][:, :rank]
    factors = fit_to_inputs(METHOD, layer, (rank,), statistics, THOROUGH)
    rest = rest_of(METHOD, layer, (rank,), factors)
    assert relative(u @ u.T @ weight, weight - rest[0]) < 1e-6
    errors = closed_errors(METHOD, layer, statistics)
    assert errors is not None
    assert errors[rank] == pytest.approx(output_error(layer, rest, statistics), rel=1e-6)


@pytest.mark.parametrize("op", GATES)
def test_work_of_a_recurrent_operator_is_that_of_both_products(op: str) -> None:
    source, shapes, _ = layers_of(recurrent(op, read="last"))
    rows = 2 * GATES[op] * STATE
    assert count_macs(source, shapes) == TIME * BATCH * rows * (INPUTS + STATE)


def test_what_meets_the_state_has_no_method() -> None:
    layers = {a.weight.name: a for a in layers_of(MODELS["LSTM"])[2]}
    assert "no method replaces what meets the state of LSTM" in (layers["r"].refusal or "")
    assert "not this one of" in (METHOD.refuse(layers["r"]) or "")
    assert layers["w"].refusal is None


def test_a_recurrent_model_is_optimized_and_replayed(tmp_path: Path) -> None:
    """Work decides, so that no time does. The inputs have a mean, which the bias makes up for."""
    rng = np.random.default_rng(7)
    gates, inputs, state = 64, 96, 16
    weights = {
        "w": low_rank(rng, gates, inputs, 12)[None] / 4 + rand(1, gates, inputs) / 200,
        "r": rand(1, gates, state) / 8,
        "head": rand(state, 8),
    }
    nodes = [
        onnx.helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], name="rnn", hidden_size=state),
        node("Squeeze", ["h", "axes"], "s"),
        node("MatMul", ["s", "head"], "y", "head"),
    ]
    axes = {"axes": np.array([0])}
    model = make_model(nodes, {"x": (12, "n", inputs)}, ["y"], weights | axes)
    source = tmp_path / "in.onnx"
    onnx.save(model, source)
    samples = {"x": (rng.standard_normal((12, 64, inputs)) + 0.5).astype(np.float32)}
    result = onnxlr.optimize(
        source,
        tmp_path / "out.onnx",
        target="macs",
        verify="layers",
        max_drop=0.2,
        method="input-svd",
        rank=12,
        jobs=1,
    )
    del samples
    rows = {row["name"]: row for row in result.report["layers"]}
    assert rows["w"]["decision"] == "input-svd"
    onnxlr.apply(result.plan, source, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
