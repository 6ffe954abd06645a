"""What the layers behind make of an error, against impulses sent through them in the runtime."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from onnxlr.calibrate.influence import influences
from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.fitting import (
    THOROUGH,
    closed_errors,
    fit_to_inputs,
    output_error,
    rest_of,
)
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.methods.registry import choose_passes
from onnxlr.model.load import load
from onnxlr.prepare.prepared import prepare
from tests.support.builders import Array, make_model, node, run
from tests.support.networks import planted
from tests.support.pass_cases import CONV, conv, the_layer

RNG = np.random.default_rng(0)


def rand(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


# Nodes behind "h" of shape (1, 6, 5, 4), with their weights. What the runtime makes of an impulse
# there is linear. Convolutions are padded so that every kernel position meets every place.
TAILS: dict[str, tuple[list[Any], dict[str, Array]]] = {
    "conv": ([node("Conv", ["h", "a"], "y", pads=[2, 1, 2, 1])], {"a": rand(7, 6, 3, 2)}),
    "grouped": (
        [node("Conv", ["h", "a"], "y", group=3, pads=[1, 0, 1, 0])],
        {"a": rand(9, 2, 2, 1)},
    ),
    "transposed": ([node("ConvTranspose", ["h", "a"], "y")], {"a": rand(6, 5, 2, 2)}),
    "flat": (
        [node("Flatten", ["h"], "f"), node("Gemm", ["f", "a"], "y", transB=1)],
        {"a": rand(9, 120)},
    ),
    "pooled": (
        [
            node("GlobalAveragePool", ["h"], "p"),
            node("Reshape", ["p", "s"], "f"),
            node("MatMul", ["f", "a"], "y"),
        ],
        {"a": rand(6, 8), "s": np.array([1, -1])},
    ),
    "averaged": (
        [node("ReduceMean", ["h"], "f", axes=[-1, 2], keepdims=0), node("MatMul", ["f", "a"], "y")],
        {"a": rand(6, 8)},
    ),
    "tokens": (
        [
            node("Reshape", ["h", "s"], "r"),
            node("Transpose", ["r"], "t", perm=[0, 2, 1]),
            node("MatMul", ["t", "a"], "y"),
        ],
        {"a": rand(6, 5), "s": np.array([1, 6, 20])},
    ),
    "joined": (
        [
            node("Neg", ["h"], "n"),
            node("Concat", ["k", "h", "n"], "c", axis=1),
            node("Conv", ["c", "a"], "y"),
        ],
        {"k": rand(1, 3, 5, 4), "a": rand(7, 15, 1, 1)},
    ),
    "two users": (
        [
            node("Conv", ["h", "a"], "u"),
            node("Conv", ["h", "b"], "v"),
            node("Concat", ["u", "v"], "y", axis=1),
        ],
        {"a": rand(7, 6, 1, 1), "b": rand(4, 6, 1, 1)},
    ),
}


def influence_in(
    tail: Sequence[Any], weights: dict[str, Array], monkeypatch: pytest.MonkeyPatch, **head: Any
) -> Array:
    """G of a Conv whose output is "h"."""
    monkeypatch.setattr("onnxlr.calibrate.influence._DAMPING", 0.0)
    nodes = [node("Conv", ["x", "w"], "h", "head", **head), *tail]
    inputs = 3 // head.get("group", 1)
    model = make_model(nodes, {"x": (1, 3, 5, 4)}, ["y"], weights | {"w": rand(6, inputs, 1, 1)})
    roots = influences(prepare(load(model), feed=None))["head"]
    return np.asarray(roots @ roots)


@pytest.mark.parametrize("name", [n for n in TAILS if n != "joined"])
def test_is_what_impulses_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tail, weights = TAILS[name]
    influence = influence_in(tail, weights, monkeypatch)
    model = make_model(tail, {"h": (1, 6, 5, 4)}, ["y"], weights)
    silent = run(model, {"h": np.zeros((1, 6, 5, 4), np.float32)})[0].astype(np.float64)
    wanted = np.zeros((6, 6))
    for place in np.ndindex(5, 4):
        columns = []
        for channel in range(6):
            impulse = np.zeros((1, 6, 5, 4), np.float32)
            impulse[(0, channel, *place)] = 1
            columns.append((run(model, {"h": impulse})[0] - silent).ravel())
        jacobian = np.stack(columns, axis=1)
        wanted += jacobian.T @ jacobian
    wanted *= 6 / np.trace(wanted)
    np.testing.assert_allclose(influence[0], wanted, rtol=1e-4, atol=1e-5)


def test_each_way_through_a_join_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares of two ways add up: what they do to each other is left out."""
    tail, weights = TAILS["joined"]
    a = weights["a"][:, :, 0, 0].astype(np.float64)
    wanted = a[:, 3:9].T @ a[:, 3:9] + a[:, 9:].T @ a[:, 9:]
    influence = influence_in(tail, weights, monkeypatch)
    np.testing.assert_allclose(influence[0], wanted * 6 / np.trace(wanted), rtol=1e-5, atol=1e-6)


def test_channels_that_are_averaged_away_are_lost() -> None:
    """The mean removes their axis, and another of the same length takes its place."""
    model = make_model(
        [
            node("Conv", ["x", "w"], "h", "head"),
            node("ReduceMean", ["h"], "f", axes=[1], keepdims=0),
            node("MatMul", ["f", "a"], "y"),
        ],
        {"x": (1, 3, 6, 6)},
        ["y"],
        {"w": rand(6, 3, 1, 1), "a": rand(6, 4)},
    )
    assert "head" not in influences(prepare(load(model), feed=None))


def test_groups_are_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tail, weights = TAILS["conv"]
    influence = influence_in(tail, weights, monkeypatch, group=3)
    a = weights["a"].astype(np.float64)
    whole = np.einsum("mcij,mdij->cd", a, a)
    whole *= 6 / np.trace(whole)
    for g in range(3):
        block = slice(2 * g, 2 * g + 2)
        np.testing.assert_allclose(influence[g], whole[block, block], rtol=1e-5, atol=1e-6)


def test_goes_on_from_layer_to_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.calibrate.influence._DAMPING", 0.5)
    v, w = rand(8, 6), rand(6, 4)
    model = make_model(
        [
            node("MatMul", ["x", "u"], "a", "first"),
            node("Relu", ["a"], "b"),
            node("MatMul", ["b", "v"], "c", "second"),
            node("Relu", ["c"], "d"),
            node("MatMul", ["d", "w"], "y", "third"),
        ],
        {"x": (2, 5)},
        ["y"],
        {"u": rand(5, 8), "v": v, "w": w},
    )
    roots = influences(prepare(load(model), feed=None))
    assert set(roots) == {"first", "second"}
    behind = np.eye(4)
    for name, weight in (("second", w), ("first", v)):
        raw = weight.astype(np.float64) @ behind @ weight.T
        behind = (raw * len(raw) / np.trace(raw) + 0.5 * np.eye(len(raw))) / 1.5
        np.testing.assert_allclose(roots[name][0] @ roots[name][0], behind, rtol=1e-5)


def test_what_is_not_understood_takes_all_directions_alike() -> None:
    model = make_model(
        [
            node("Conv", ["x", "w"], "h", "head"),
            node("Softmax", ["h"], "y", axis=1),
            node("Conv", ["h", "a"], "z", "reader"),
        ],
        {"x": (1, 3, 5, 4)},
        ["y", "z"],
        {"w": rand(6, 3, 1, 1), "a": np.eye(6, dtype=np.float32)[:1, :, None, None]},
    )
    (root,) = influences(prepare(load(model), feed=None)).values()
    values = np.diag(root[0] @ root[0])
    # One direction of six counts 6 by the reader; the other reader and the damping count 1 each.
    np.testing.assert_allclose(values, np.array([8, 2, 2, 2, 2, 2]) / 3, rtol=1e-6)


def weighted_layer(method: str) -> tuple[Layer, GraphPass, Statistics]:
    shape = (10, 8) if method == "svd" else (10, 6, 3, 3)
    inputs = (4, 8) if method == "svd" else (1, 6, 7, 7)
    op = "Gemm" if method == "svd" else "Conv"
    attributes = {"transB": 1} if method == "svd" else {}
    model = make_model(
        [node(op, ["x", "w"], "y", "layer", **attributes)],
        {"x": inputs},
        ["y"],
        {"w": rand(*shape)},
    )
    (layer,) = prepare(load(model), feed=None).layers
    n = math.prod(shape[1:])
    mixed = RNG.standard_normal((n, n)) * np.geomspace(1, 0.05, n)
    turned = np.linalg.qr(RNG.standard_normal((10, 10)))[0]
    metric = (turned * np.geomspace(3, 0.1, 10)) @ turned.T
    statistics = Statistics(np.zeros((1, n)), (mixed.T @ mixed)[None], 99, metric[None])
    return layer, choose_passes((method,))[0], statistics


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ("svd", (3,)),
        ("channel-svd", (3,)),
        ("spatial-svd", (5,)),
        ("tucker2", (3, 4)),
        ("input-channel-svd", (4,)),
        ("cp3", (8,)),
        ("tiled-svd", (2, 2, 2)),
        ("slice-svd", (1,)),
    ],
)
def test_factors_lose_least_where_it_counts(method: str, rank: tuple[int, ...]) -> None:
    layer, graph_pass, statistics = weighted_layer(method)
    plain = Statistics(statistics.mean, statistics.covariance, statistics.rows)

    def error(fitted_for: Statistics, by: Statistics) -> float:
        factors = fit_to_inputs(graph_pass, layer, rank, fitted_for, THOROUGH)
        return output_error(layer, rest_of(graph_pass, layer, rank, factors), by)

    fitted, other = error(statistics, statistics), error(plain, statistics)
    if method in ("tiled-svd", "slice-svd"):  # their factors can't take account of it
        assert fitted == pytest.approx(other)
        return
    assert fitted < 0.97 * other
    assert error(plain, plain) < 0.99 * error(statistics, plain)
    told = closed_errors(graph_pass, layer, statistics)
    if told is not None:
        assert fitted == pytest.approx(told[rank[0]], rel=1e-6)
    full = graph_pass.full_rank(layer)
    if method != "cp3":
        factors = fit_to_inputs(graph_pass, layer, full, statistics, THOROUGH)
        assert output_error(layer, rest_of(graph_pass, layer, full, factors), statistics) < 1e-6


@pytest.mark.parametrize("method", CONV)
def test_planted_ranks_stay_exact_whatever_counts(method: str) -> None:
    kernel = planted(method, np.random.default_rng(3))
    model = conv((1, 10, 8, 8), kernel.shape, pads=[1, 1, 1, 1])
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(kernel, "w"))
    layer, graph_pass = the_layer(model, method)
    rank = {"tucker2": (4, 5), "tiled-svd": (4, 2, 2), "slice-svd": (1,)}.get(method, (4,))
    rng = np.random.default_rng(4)
    inputs, outputs = (rng.standard_normal((1, n, n)) for n in (90, 12))
    statistics = Statistics(
        np.zeros((1, 90)),
        inputs @ inputs.swapaxes(1, 2),
        1000,
        outputs @ outputs.swapaxes(1, 2) + np.eye(12),
    )
    factors = fit_to_inputs(graph_pass, layer, rank, statistics, THOROUGH)
    assert output_error(layer, rest_of(graph_pass, layer, rank, factors), statistics) < 1e-5


def test_the_error_is_that_of_what_comes_out() -> None:
    """Two products in a row: behind the second an error of the first is what was predicted."""
    layer, graph_pass, plain = weighted_layer("svd")
    second = RNG.standard_normal((10, 12))
    whole = second @ second.T
    values, vectors = np.linalg.eigh(whole)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    statistics = Statistics(plain.mean, plain.covariance, plain.rows, root[None])
    factors = fit_to_inputs(graph_pass, layer, (3,), statistics, THOROUGH)
    weight = layer.array().astype(np.float64)
    rest = weight - graph_pass.compose(layer, (3,), factors)
    x = RNG.standard_normal((400_000, 8)) @ np.linalg.cholesky(statistics.covariance[0]).T
    lost, made = (np.linalg.norm(x @ w.T @ second) for w in (rest, weight))
    told = output_error(layer, rest[None], statistics)
    assert told == pytest.approx(lost / made, rel=0.01)


def test_a_weight_that_is_seen_both_ways_round() -> None:
    """A weight serves both ways: the influence of one side's outputs isn't the other's."""
    model = make_model(
        [
            node("MatMul", ["x", "u"], "a", "before"),
            node("MatMul", ["a", "w"], "b", "encode"),
            node("Transpose", ["w"], "t", perm=[1, 0]),
            node("MatMul", ["b", "t"], "c", "decode"),
            node("MatMul", ["c", "v"], "y", "behind"),
        ],
        {"x": (2, 5)},
        ["y"],
        {"u": rand(5, 6), "w": rand(6, 12), "v": rand(6, 4)},
    )
    assert set(influences(prepare(load(model), feed=None))) == {"before"}


def test_channels_of_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the only axis, also where the constant is the left factor."""
    monkeypatch.setattr("onnxlr.calibrate.influence._DAMPING", 0.0)
    v = rand(4, 6)
    model = make_model(
        [
            node("MatMul", ["u", "x"], "a", "first"),
            node("Transpose", ["a"], "t", perm=[0]),
            node("MatMul", ["v", "t"], "b", "second"),
            node("Relu", ["b"], "c"),
            node("MatMul", ["c", "z"], "y", "third"),
        ],
        {"x": (5,)},
        ["y"],
        {"u": rand(6, 5), "v": v, "z": rand(4, 3)},
    )
    roots = influences(prepare(load(model), feed=None))
    assert set(roots) == {"first", "second"}
    second = roots["second"][0] @ roots["second"][0]
    raw = v.T.astype(np.float64) @ second @ v
    influence = roots["first"][0] @ roots["first"][0]
    np.testing.assert_allclose(influence, raw * 6 / np.trace(raw), rtol=1e-5, atol=1e-9)


def test_a_model_without_such_layers_has_none() -> None:
    model = make_model([node("Relu", ["x"], "y")], {"x": (2, 3)}, ["y"], {})
    assert influences(prepare(load(model), feed=None)) == {}


def test_entries_of_a_table_count_as_the_layers_behind_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W·Wᵀ of a MatMul behind the lookup, with a mean of 1; columns have no influence told."""
    monkeypatch.setattr("onnxlr.calibrate.influence._DAMPING", 0.0)
    weights = {"e": rand(11, 6), "a": rand(6, 8), "i": np.array([[0, 3, 5]])}
    weights |= {"b": rand(4, 9), "d": rand(3, 5)}
    nodes = [
        node("Gather", ["e", "i"], "h", "table"),
        node("Add", ["h", "x"], "s"),
        node("MatMul", ["s", "a"], "y"),
        node("Gather", ["b", "i"], "c", "columns", axis=1),
        node("MatMul", ["c", "d"], "z"),
    ]
    model = make_model(nodes, {"x": (1, 3, 6)}, ["y", "z"], weights)
    roots = influences(prepare(load(model), feed=None))
    assert "columns" not in roots
    whole = weights["a"].astype(np.float64) @ weights["a"].T
    whole /= np.trace(whole) / 6
    np.testing.assert_allclose(roots["table"][0] @ roots["table"][0], whole, rtol=1e-6, atol=1e-6)
