"""shared-svd: layers of one input have a factor in common, stored once and computed once."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxlr
from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.candidate import Candidate
from onnxlr.candidates.fitting import THOROUGH, closed_errors, fit_to_inputs, output_error, rest_of
from onnxlr.candidates.shared import refit_shared
from onnxlr.decompose import Covariance
from onnxlr.layers.kernel import as_matrix
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import count_macs
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.cost import chain_macs, chain_params
from onnxlr.methods.registry import find_pass
from onnxlr.model.protobuf import to_proto
from onnxlr.plan.knapsack import allocate
from onnxlr.rewrite.replace import rewrite
from onnxlr.types import Rank
from tests.support.builders import Array, layers_of, low_rank, make_model, node, relative, run

SHARED, SVD = find_pass("shared-svd"), find_pass("svd")


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matmuls(outputs: tuple[int, ...], *, rank: int = 0, opset: int = 17) -> onnx.ModelProto:
    """Projections of one input to so many features each, with one column space of a rank."""
    rng = np.random.default_rng(3)
    whole = low_rank(rng, 12, sum(outputs), rank) if rank else rand(12, sum(outputs))
    weights = dict(zip("abcdef", np.split(whole, np.cumsum(outputs)[:-1], axis=1), strict=False))
    nodes = [node("MatMul", ["x", name], f"y_{name}", f"to_{name}") for name in weights]
    outs = [f"y_{name}" for name in weights]
    return make_model(nodes, {"x": (5, 12)}, outs, weights, opset=opset)


def gemms(*, left: bool, flip: int) -> onnx.ModelProto:
    """Two Gemms of one input; their weights have 7 and 5 outputs."""
    weights, nodes = {}, []
    for name, count in (("a", 7), ("b", 5)):
        outputs_first = left != bool(flip)
        weights[name] = rand(*((count, 12) if outputs_first else (12, count)))
        weights[f"c_{name}"] = rand(*((count, 1) if left else (count,)), seed=1)
        order = [name, "x"] if left else ["x", name]
        flags = {"transA": flip} if left else {"transB": flip}
        nodes.append(
            node("Gemm", [*order, f"c_{name}"], f"y_{name}", f"to_{name}", alpha=0.5, **flags)
        )
    return make_model(nodes, {"x": (12, 4) if left else (4, 12)}, ["y_a", "y_b"], weights)


def convs(**attributes: Any) -> onnx.ModelProto:
    """Two convolutions of one input, to 6 and 9 channels."""
    weights = {"a": rand(6, 4, 3, 3), "b": rand(9, 4, 3, 3, seed=2), "c": rand(6, seed=4)}
    nodes = [
        node("Conv", ["x", "a", "c"], "y_a", "to_a", **attributes),
        node("Conv", ["x", "b"], "y_b", "to_b", **attributes),
    ]
    return make_model(nodes, {"x": (2, 4, 9, 9)}, ["y_a", "y_b"], weights)


MODELS = {
    "three MatMul": matmuls((8, 8, 8)),
    "of other widths": matmuls((8, 3, 5, 4)),
    "old MatMul": matmuls((8, 8), opset=7),
    "Gemm": gemms(left=False, flip=0),
    "Gemm transposed": gemms(left=False, flip=1),
    "Gemm on the left": gemms(left=True, flip=0),
    "Gemm on the left transposed": gemms(left=True, flip=1),
    "Conv": convs(pads=[1, 1, 1, 1]),
    "Conv strided": convs(strides=[2, 1], pads=[0, 1, 1, 0], dilations=[1, 2]),
    "Conv padded by itself": convs(auto_pad="SAME_UPPER", strides=[2, 2]),
}


def shared(model: onnx.ModelProto, rank: Rank | None = None) -> tuple[onnx.ModelProto, int]:
    """The model with every layer by shared-svd, and the rank; the full one without one."""
    source, shapes, layers = layers_of(model)
    rank = rank or SHARED.full_rank(layers[0])
    factors = {a.name: Factored(SHARED.factorize(a, rank)) for a in layers}
    choices = {a.name: Choice(SHARED, rank) for a in layers}
    return to_proto(rewrite(source, shapes, choices, factors)), rank[0]


def feed_of(model: onnx.ModelProto) -> dict[str, Array]:
    (x,) = (i for i in model.graph.input if i.name == "x")
    return {"x": rand(*(d.dim_value for d in x.type.tensor_type.shape.dim), seed=9)}


@pytest.mark.parametrize("case", MODELS)
def test_it_is_exact_at_full_rank_with_the_input_multiplied_once(case: str) -> None:
    model = MODELS[case]
    replaced, rank = shared(model)
    onnx.checker.check_model(replaced, full_check=True)
    for before, after in zip(
        run(model, feed_of(model)), run(replaced, feed_of(model)), strict=True
    ):
        assert relative(before, after) <= 1e-5
    readers = [n for n in replaced.graph.node if "x" in n.input]
    assert len(readers) == 1
    assert len(replaced.graph.node) == 1 + len(model.graph.node)
    common = [i for i in replaced.graph.initializer if "shared_svd" in i.name and rank in i.dims]
    assert len(common) == 1 + len(model.graph.node)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=15, deadline=None)
def test_a_planted_common_rank_is_exact(outputs: list[int], rank: int, seed: int) -> None:
    rank = min(rank, sum(outputs))
    model = matmuls(tuple(outputs), rank=rank)
    replaced, _ = shared(model, (rank,))
    x = rand(5, 12, seed=seed)
    for before, after in zip(run(model, {"x": x}), run(replaced, {"x": x}), strict=True):
        assert relative(before, after) <= 1e-4


def test_siblings_read_one_input_in_the_same_way() -> None:
    weights = {name: rand(12, 12) for name in "abcd"} | {"k": rand(4, 12, 1)}
    nodes = [
        node("MatMul", ["x", "a"], "y1", "one"),
        node("MatMul", ["x", "b"], "y2", "two"),
        node("MatMul", ["c", "x"], "y3", "from the left"),
        node("Relu", ["x"], "z"),
        node("MatMul", ["z", "d"], "y4", "of another input"),
        node("Conv", ["x", "k"], "y5", "a convolution"),
    ]
    model = make_model(nodes, {"x": (2, 12, 12)}, [f"y{i}" for i in range(1, 6)], weights)
    layers = {a.name: a for a in layers_of(model)[2]}
    found = {name: [s.name for s in a.siblings] for name, a in layers.items()}
    assert found == {
        "one": ["one", "two"],
        "two": ["one", "two"],
        "from the left": [],
        "of another input": [],
        "a convolution": [],
    }
    assert SHARED.refuse(layers["of another input"]) == (
        "shared-svd: no other layer reads its input in the same way"
    )


def test_too_many_siblings_are_not_decomposed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"w{i}": rand(4, 3, seed=i) for i in range(9)}
    nodes = [node("MatMul", ["x", name], f"y {name}", name) for name in weights]
    model = make_model(nodes, {"x": (2, 4)}, [f"y {name}" for name in weights], weights)
    layer = layers_of(model)[2][0]
    words = "layers of 27 outputs read its input, too many to be decomposed together"
    assert SHARED.refuse(layer) == f"shared-svd: 9 {words}"
    few = layers_of(MODELS["three MatMul"])[2][0]
    assert SHARED.refuse(few) is None
    monkeypatch.setattr("onnxlr_passes.shared_svd._LARGEST", 24 * 12 - 1)
    assert "too many to be decomposed" in (SHARED.refuse(few) or "")


@pytest.mark.parametrize(
    "other", [{"strides": [2, 2]}, {"pads": [1, 1, 1, 1]}, {"dilations": [2, 2]}, {"group": 2}]
)
def test_convolutions_that_slide_otherwise_are_no_siblings(other: dict[str, Any]) -> None:
    weights = {"a": rand(6, 4, 3, 3), "b": rand(6, 4 // other.get("group", 1), 3, 3)}
    nodes = [
        node("Conv", ["x", "a"], "y_a", "to_a"),
        node("Conv", ["x", "b"], "y_b", "to_b", **other),
    ]
    model = make_model(nodes, {"x": (2, 4, 9, 9)}, ["y_a", "y_b"], weights)
    assert not any(a.siblings for a in layers_of(model)[2])


@pytest.mark.parametrize("case", ["three MatMul", "of other widths", "Gemm", "Conv strided"])
def test_costs_of_siblings_are_those_of_what_is_written(case: str) -> None:
    model = MODELS[case]
    layers = layers_of(model)[2]
    replaced, rank = shared(model, (3,))
    source, shapes, _ = layers_of(replaced)
    macs = sum(chain_macs(a, SHARED, (3,)) or 0 for a in layers)
    written = count_macs(source, shapes)
    assert written <= macs <= written + len(layers)
    stored = sum(int(np.prod(i.dims)) for i in replaced.graph.initializer if "shared" in i.name)
    params = sum(chain_params(a, SHARED, (rank,)) for a in layers)
    assert stored <= params <= stored + len(layers)


def data(n: int, *, directions: int | None = None) -> Statistics:
    """Moments of correlated inputs, in some directions only if so many are given."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((400, directions or n)) @ rng.standard_normal((directions or n, n))
    rows = rows * np.geomspace(1, 0.05, n)
    centred = rows - rows.mean(axis=0)
    return Statistics(rows.mean(axis=0)[None], (centred.T @ centred / 400)[None], 400)


def oracle(layers: tuple[Layer, ...], covariance: Array, rank: int) -> list[Array]:
    """The best products for the sum of relative squared errors, by a plain SVD of W·C½."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    weights = [as_matrix(a, a.array())[0] for a in layers]
    sizes = [np.linalg.norm(w @ root) for w in weights]
    stack = np.concatenate([w / s for w, s in zip(weights, sizes, strict=True)])
    u = np.linalg.svd(stack @ root, full_matrices=False)[0][:, :rank]
    best = u @ (u.T @ stack)
    parts = np.split(best, np.cumsum([len(w) for w in weights])[:-1])
    return [part * s for part, s in zip(parts, sizes, strict=True)]


@pytest.mark.parametrize("case", ["three MatMul", "of other widths", "Gemm transposed", "Conv"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_factors_fitted_to_data_are_the_best_there_are(case: str, rank: int) -> None:
    layers = layers_of(MODELS[case])[2]
    n = as_matrix(layers[0], layers[0].array()).shape[2]
    statistics = data(n)
    best = oracle(layers, statistics.covariance[0], rank)
    for layer, wanted in zip(layers, best, strict=True):
        factors = fit_to_inputs(SHARED, layer, (rank,), statistics, THOROUGH)
        rest = rest_of(SHARED, layer, (rank,), factors)
        made = as_matrix(layer, layer.array()) - rest
        assert relative(wanted, made[0]) < 1e-6
        errors = closed_errors(SHARED, layer, statistics)
        assert errors is not None
        assert errors[rank] == pytest.approx(
            output_error(layer, rest, statistics), rel=1e-6, abs=1e-7
        )


def test_the_error_at_every_rank_counts_the_metric_of_the_outputs() -> None:
    layers = layers_of(MODELS["three MatMul"])[2]
    metric = np.diag(np.geomspace(1, 4, 8))[None]
    statistics = replace(data(12), metric=metric)
    for layer in layers:
        errors = closed_errors(SHARED, layer, statistics)
        assert errors is not None
        for rank in (1, 4, 9):
            factors = fit_to_inputs(SHARED, layer, (rank,), statistics, THOROUGH)
            rest = rest_of(SHARED, layer, (rank,), factors)
            assert errors[rank] == pytest.approx(
                output_error(layer, rest, statistics), rel=1e-6, abs=1e-7
            )


def test_the_common_factor_is_the_same_to_the_bit_and_covers_data_of_few_directions() -> None:
    layers = layers_of(MODELS["of other widths"])[2]
    statistics = data(12, directions=3)
    fitted = [fit_to_inputs(SHARED, a, (4,), statistics, THOROUGH) for a in layers]
    assert all(np.array_equal(f[0], fitted[0][0]) for f in fitted)
    for layer, factors in zip(layers, fitted, strict=True):
        assert output_error(layer, rest_of(SHARED, layer, (4,), factors), statistics) < 1e-4


@pytest.mark.parametrize("case", ["three MatMul", "Gemm transposed", "Conv"])
def test_a_correction_leaves_the_common_factor_and_fits_the_other(case: str) -> None:
    layer = layers_of(MODELS[case])[2][0]
    weight = as_matrix(layer, layer.array())[0]
    covariance = data(weight.shape[1]).covariance[0]
    start = SHARED.factorize(layer, (3,))
    target = weight + 0.3 * rand(*weight.shape, seed=8)
    corrected = refit_shared(SHARED, layer, (3,), target, Covariance(covariance), start)
    (before,), (after,) = (SHARED.unpack(layer, (3,), f) for f in (start, corrected))
    common = [i for i in range(2) if np.array_equal(before[i], after[i])]
    assert len(common) == 1
    made = as_matrix(layer, SHARED.compose(layer, (3,), corrected))[0]
    rows = np.linalg.svd(as_matrix(layer, SHARED.compose(layer, (3,), start))[0])[2][:3]
    gram = rows @ covariance @ rows.T
    assert relative(target @ covariance @ rows.T @ np.linalg.inv(gram) @ rows, made) < 1e-6


def candidate(method: Any, rank: int, cost: float, loss: float) -> Candidate:
    return Candidate(Choice(method, (rank,)), 1, 1, 1, cost=cost, loss=loss)


@pytest.mark.parametrize("seed", range(25))
def test_the_solver_shares_among_all_siblings_or_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["q", "k", "v", "alone"]
    as_is = dict(zip(names, rng.uniform(2, 4, 4).tolist(), strict=True))
    candidates = {
        name: [candidate(SVD, r, as_is[name] * c, d) for r, c, d in rng.uniform(0.2, 1, (2, 3))]
        for name in names
    }
    candidates = {
        name: [replace(c, choice=Choice(SVD, (i + 1,))) for i, c in enumerate(rows)]
        for name, rows in candidates.items()
    }
    family = names[:3]
    for name in family:
        candidates[name] += [
            candidate(
                SHARED, r, as_is[name] * float(rng.uniform(0.1, 0.9)), float(rng.uniform(0, 1))
            )
            for r in (4, 8)
        ]
    most = float(rng.uniform(0.3, 2))
    chosen = allocate(candidates, as_is, most_loss=most, families=dict.fromkeys(family, family))
    assert chosen is not None
    together = [chosen[n].choice for n in family if n in chosen and chosen[n].shares]
    assert len(together) in (0, 3)
    assert len(set(together)) <= 1

    def allowed(row: tuple[Candidate | None, ...]) -> bool:
        choices = [c.choice if c is not None and c.shares else None for c in row[:3]]
        return len(set(choices)) == 1

    options = [[None, *candidates[name]] for name in names]
    every = [row for row in product(*options) if allowed(row)]
    costs = [
        sum(as_is[n] if c is None else c.cost for n, c in zip(names, row, strict=True))
        for row in every
        if sum(0.0 if c is None else c.loss for c in row) <= most
    ]
    reached = sum(chosen[n].cost if n in chosen else as_is[n] for n in names)
    assert reached <= min(costs) * 1.001


def test_without_a_sibling_s_candidate_nothing_is_shared() -> None:
    shares = {"q": [candidate(SHARED, 4, 0.1, 0.0)], "k": [candidate(SHARED, 4, 0.1, 0.0)], "v": []}
    families = dict.fromkeys("qkv", "qkv")
    as_is = dict.fromkeys("qkv", 1.0)
    assert allocate(shares, as_is, most_loss=1.0, families=families) == {}
    shares["v"] = [candidate(SHARED, 4, 0.1, 0.0)]
    chosen = allocate(shares, as_is, most_loss=1.0, families=families)
    assert chosen is not None
    assert set(chosen) == set("qkv")


def projections(path: Path, *, rank: int = 24, size: int = 128, rows: int = 64) -> Path:
    """Three projections with one column space, each with a spectrum of its own behind it."""
    rng = np.random.default_rng(11)
    space = rng.standard_normal((size, rank)) / math.sqrt(size)
    nodes, weights = [], {}
    for i in range(3):
        weights[f"w{i}"] = (space @ rng.standard_normal((rank, size))).astype(np.float32)
        weights[f"b{i}"] = rng.standard_normal(size).astype(np.float32)
        nodes += [
            node("MatMul", ["x", f"w{i}"], f"h{i}", f"to_{i}"),
            node("Add", [f"h{i}", f"b{i}"], f"z{i}"),
        ]
    nodes += [
        node("Relu", ["z0"], "r"),
        node("Tanh", ["z1"], "t"),
        node("Sum", ["r", "t", "z2"], "y"),
    ]
    model = make_model(nodes, {"x": ("n", rows, size)}, ["y"], weights)
    onnx.save(model, path)
    return path


def test_projections_of_one_input_share_in_the_file_that_is_written(tmp_path: Path) -> None:
    """MACs decide, so that no time does; at one rank sharing saves most and loses as little."""
    source = projections(tmp_path / "in.onnx")
    samples = np.random.default_rng(1).standard_normal((96, 64, 128)).astype(np.float32)
    result = onnxlr.optimize(
        source,
        tmp_path / "out.onnx",
        data={"x": samples},
        target="macs",
        metric="rel-error",
        max_drop=0.02,
        jobs=1,
    )
    rows = result.report["layers"]
    assert [row["decision"] for row in rows] == ["shared-svd"] * 3
    assert len({row["rank"] for row in rows}) == 1
    written = onnx.load(tmp_path / "out.onnx")
    assert sum(n.op_type == "MatMul" for n in written.graph.node) == 4
    assert len([n for n in written.graph.node if "x" in n.input]) == 1
    assert result.report["metric"]["loss"] <= 0.02
    onnxlr.apply(result.plan, source, tmp_path / "again.onnx", data={"x": samples})
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
