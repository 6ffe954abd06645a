"""Layers whose inputs have too many elements for a covariance: fitted to data all the same."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxlr.calibrate import statistics as statistics_module
from onnxlr.calibrate import wide as wide_module
from onnxlr.calibrate.kept import read_statistics, write_statistics
from onnxlr.calibrate.statistics import Statistics, is_wide, weight_only_reason
from onnxlr.calibrate.wide import gives_product, rows_to_sample
from onnxlr.candidates.fitting import (
    GLANCE,
    THOROUGH,
    bias_shift,
    closed_errors,
    fit_to_inputs,
    output_error,
    rest_of,
)
from onnxlr.layers.kernel import as_matrix
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.registry import choose_passes
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.originals import Originals
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Silent
from onnxlr.rewrite.replace import rewrite
from onnxlr.rewrite.sequential import correct
from onnxlr.rewrite.variant import Variant
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.session import Feed
from onnxlr.types import Rank
from tests.support.builders import make_model, node
from tests.support.calibration import by_channel, calibrated, outputs, prepared_of, without_bias
from tests.support.pass_cases import conv, gemm, matmul, rand

CASES: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "conv": (lambda: conv((4, 6, 9, 8), (8, 6, 3, 3), pads=[1, 1, 1, 1]), "channel-svd"),
    "no bias": (lambda: conv((4, 6, 9, 8), (8, 6, 3, 3), bias=False), "channel-svd"),
    "grouped": (lambda: conv((4, 6, 9, 8), (9, 2, 3, 3), group=3, strides=[2, 1]), "channel-svd"),
    "1-d": (lambda: conv((4, 6, 20), (8, 6, 5), strides=[2], pads=[2, 1]), "channel-svd"),
    "matmul": (lambda: matmul((4, 8), (8, 6)), "svd"),
    "matmul left 3-d": (lambda: matmul((2, 6, 4), (8, 6), left=True), "svd"),
    **{
        f"gemm {left} {w} {x}": (
            partial(gemm, left=left, flip_w=w, flip_x=x, bias=not left, alpha=0.7, beta=1.3),
            "svd",
        )
        for left in (False, True)
        for w in (0, 1)
        for x in (0, 1)
    },
}


@pytest.fixture
def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any layer is wide, and all that it is given and gives is looked at."""
    monkeypatch.setattr(statistics_module, "WIDEST", 1)
    monkeypatch.setattr(statistics_module, "_ROWS", 10**6)
    monkeypatch.setattr(statistics_module, "_MOST_ROWS", 10**9)
    monkeypatch.setattr(wide_module, "WIDEST", 1000)
    monkeypatch.setattr(wide_module, "SAMPLED_ROWS", 10**6)


def fit_of(
    prepared: Prepared, feeds: list[Feed], method: str
) -> tuple[Layer, GraphPass, Rank, Statistics]:
    (layer,) = prepared.layers
    statistics = calibrated(prepared, [layer], feeds)[layer.name]
    (graph_pass,) = choose_passes((method,))
    ladder = graph_pass.ladder(layer)
    return layer, graph_pass, ladder[min(len(ladder) // 2, 20)], statistics


def measured(
    prepared: Prepared,
    model: onnx.ModelProto,
    feeds: list[Feed],
    layer: Layer,
    choice: Choice,
    factored: Factored,
) -> float:
    """The relative error of the layer's output, about its mean, as ONNX Runtime has it."""
    written = to_proto(
        rewrite(prepared.model, prepared.shapes, {layer.name: choice}, {layer.name: factored})
    )
    before, after = outputs(model, feeds), outputs(written, feeds)
    apart = sum(float(np.sum((a - b) ** 2)) for a, b in zip(before, after, strict=True))
    flat = by_channel(layer, outputs(without_bias(model), feeds))
    return float(np.sqrt(apart / np.sum((flat - flat.mean(axis=1, keepdims=True)) ** 2)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("every_row")
def test_the_covariance_of_the_outputs_tells_the_error(case: str) -> None:
    """At every rank, as exactly as that of the inputs would."""
    make, method = CASES[case]
    model = make()
    prepared, feeds = prepared_of(model)
    layer, graph_pass, _, statistics = fit_of(prepared, feeds, method)
    assert is_wide(layer)
    assert gives_product(layer)
    assert statistics.covariance.size == 0
    errors = closed_errors(graph_pass, layer, statistics)
    assert errors is not None
    for rank in graph_pass.ladder(layer):
        factors = fit_to_inputs(graph_pass, layer, rank, statistics, THOROUGH)
        shift = bias_shift(rest_of(graph_pass, layer, rank, factors), statistics.mean)
        found = measured(
            prepared, model, feeds, layer, Choice(graph_pass, rank), Factored(factors, shift)
        )
        assert errors[rank[0]] == pytest.approx(found, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("group", [1, 3])
def test_the_influence_on_layers_behind_counts_as_with_a_covariance(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same errors at every rank, and factors of the same product."""
    model = conv((8, 6, 9, 8), (9, 6 // group, 3, 3), group=group)
    prepared, feeds = prepared_of(model, rows=10)
    monkeypatch.setattr(statistics_module, "_ROWS", 10**6)
    layer, graph_pass, _, dense = fit_of(prepared, feeds, "channel-svd")
    monkeypatch.setattr(statistics_module, "WIDEST", 1)
    wide = calibrated(prepared, [layer], feeds)[layer.name]
    assert wide.outputs is not None
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((group, 9 // group, 9 // group))
    metric = roots @ roots.swapaxes(1, 2) + np.eye(9 // group)
    told = [
        closed_errors(graph_pass, layer, replace(item, metric=metric)) for item in (dense, wide)
    ]
    assert told[0] is not None
    assert told[1] is not None
    np.testing.assert_allclose(told[1], told[0], rtol=1e-3, atol=1e-4)
    plain = closed_errors(graph_pass, layer, wide)
    assert plain is not None
    assert not np.allclose(told[1], plain, rtol=0.01)
    rank: Rank = (2,)
    made = [
        graph_pass.compose(
            layer,
            rank,
            fit_to_inputs(graph_pass, layer, rank, replace(item, metric=metric), THOROUGH),
        )
        for item in (dense, wide)
    ]
    np.testing.assert_allclose(made[1], made[0], rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("every_row")
def test_a_bias_that_changes_from_row_to_row_isnt_taken_for_a_constant() -> None:
    """Then the sampled rows tell what the weight makes of them."""
    model = make_model(
        [node("Gemm", ["x", "w", "b"], "y", "fc")],
        {"x": (5, 8)},
        ["y"],
        {"w": rand(8, 6), "b": rand(5, 6) * 50},
    )
    prepared, feeds = prepared_of(model, rows=400)
    layer, graph_pass, rank, statistics = fit_of(prepared, feeds, "svd")
    assert not gives_product(layer)
    assert statistics.outputs is None
    errors = closed_errors(graph_pass, layer, statistics)
    assert errors is not None
    factors = fit_to_inputs(graph_pass, layer, rank, statistics, THOROUGH)
    rest = rest_of(graph_pass, layer, rank, factors)
    assert errors[rank[0]] == pytest.approx(output_error(layer, rest, statistics), rel=0.15)


@pytest.mark.parametrize(
    "method", ["spatial-svd", "tucker2", "input-channel-svd", "cp3", "tiled-svd"]
)
def test_rows_fit_as_the_covariance_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many rows, on inputs that nothing was fitted to: within five per cent."""
    model = conv((8, 6, 9, 8), (8, 6, 3, 3), bias=False)
    prepared, feeds = prepared_of(model, rows=30)
    layer, graph_pass, _, dense = fit_of(prepared, feeds, method)
    ladder = graph_pass.ladder(layer)
    rank = ladder[len(ladder) // 5]
    monkeypatch.setattr(statistics_module, "WIDEST", 1)
    wide = calibrated(prepared, [layer], feeds)[layer.name]
    assert wide.sample is not None
    assert wide.sample.shape == (1, 2048, 54)
    plain = graph_pass.factorize(layer, rank)
    fitted = [fit_to_inputs(graph_pass, layer, rank, s, THOROUGH) for s in (dense, wide)]
    lost = [
        output_error(layer, rest_of(graph_pass, layer, rank, factors), dense)
        for factors in (*fitted, plain)
    ]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)
    assert lost[1] < 0.97 * lost[2]
    # What the rows that are held out tell is what the covariance tells.
    rest = rest_of(graph_pass, layer, rank, fitted[1])
    assert output_error(layer, rest, wide) == pytest.approx(lost[1], rel=0.1)


def wide_network(channels: int = 16) -> onnx.ModelProto:
    """A conv with a fan-in of 8,192, and a Gemm behind it with 6,144 inputs."""
    nodes = [
        node("Conv", ["x", "k", "c"], "h", "conv"),
        node("Relu", ["h"], "r"),
        node("Flatten", ["r"], "f"),
        node("Gemm", ["f", "w", "b"], "y", "fc"),
    ]
    weights = {
        "k": rand(channels, 128, 64, 1),
        "c": rand(channels),
        "w": rand(channels * 384, 20),
        "b": rand(20),
    }
    return make_model(nodes, {"x": (1, 128, 447, 1)}, ["y"], weights)


def few_directions(count: int, seed: int) -> list[Feed]:
    """Inputs in some directions only, the same for every seed, and a little of all others."""
    mixing = np.random.default_rng(0).standard_normal((128, 6))
    rng = np.random.default_rng(seed)
    feeds: list[Feed] = []
    for _ in range(count):
        x = mixing @ np.cumsum(rng.standard_normal((6, 447)), axis=1) / 10
        x += 0.05 * rng.standard_normal(x.shape)
        feeds.append({"x": x[None, :, :, None].astype(np.float32)})
    return feeds


@pytest.mark.parametrize(
    ("name", "method", "rank"),
    [
        ("conv", "channel-svd", (3,)),
        ("conv", "input-channel-svd", (6,)),
        ("conv", "tucker2", (6, 4)),
        ("fc", "svd", (3,)),
    ],
)
def test_wide_layers_profit_from_data(
    name: str, method: str, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted to inputs they lose far less of the output on others than fitted to the weight."""
    monkeypatch.setattr(wide_module, "SAMPLED_ROWS", 400)
    model = wide_network()
    prepared, _ = prepared_of(model, rows=1)
    layer = prepared.layer(name)
    assert weight_only_reason(layer) is None
    statistics = calibrated(prepared, [layer], few_directions(60, 1))[name]
    (graph_pass,) = choose_passes((method,))
    held = few_directions(20, 2)
    errors = []
    for factors in (
        graph_pass.factorize(layer, rank),
        fit_to_inputs(graph_pass, layer, rank, statistics, THOROUGH),
    ):
        rest = rest_of(graph_pass, layer, rank, factors)
        fresh = calibrated(prepared, [layer], held)[name]
        errors.append(output_error(layer, rest, fresh))
    assert errors[1] < 0.8 * errors[0]
    glanced = fit_to_inputs(graph_pass, layer, rank, statistics, GLANCE)
    rest = rest_of(graph_pass, layer, rank, glanced)
    assert output_error(layer, rest, statistics) < 0.9 * errors[0]
    closed = closed_errors(graph_pass, layer, statistics)
    if closed is not None:
        assert closed[rank[0]] == pytest.approx(errors[1], rel=0.5)


def test_sampled_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all wide layers together, however many samples and positions there are."""
    prepared, _ = prepared_of(wide_network(), rows=1)
    monkeypatch.setattr(wide_module, "SAMPLED_BYTES", 2 << 20)
    statistics = calibrated(prepared, list(prepared.layers), few_directions(50, 1))
    sizes = [item.sample.nbytes for item in statistics.values() if item.sample is not None]
    assert len(sizes) == 2
    assert 0.95 * (2 << 20) < sum(sizes) <= 2 << 20 or sum(sizes) < 2 << 20
    conv_rows = rows_to_sample(prepared.layer("conv"), 2)
    assert conv_rows == (1 << 20) // (4 * 8192)
    assert statistics["conv"].rows == conv_rows  # of fifty samples: a row of some of them
    assert statistics["fc"].rows == 42
    monkeypatch.setattr(wide_module, "SAMPLED_ROWS", 7)
    again = calibrated(prepared, list(prepared.layers), few_directions(50, 1))
    assert {item.rows for item in again.values()} == {7}
    mean = again["fc"].sample
    assert mean is not None
    np.testing.assert_allclose(mean.mean(axis=1), 0, atol=1e-4)


def test_shards_of_samples_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come from all of the samples, and moments of outputs are those of all."""
    monkeypatch.setattr(statistics_module, "WIDEST", 1)
    monkeypatch.setattr(wide_module, "SAMPLED_ROWS", 50)
    prepared, feeds = prepared_of(matmul((1, 8), (8, 6)), rows=100)
    (layer,) = prepared.layers
    item = calibrated(prepared, [layer], feeds)[layer.name]
    assert item.sample is not None
    assert item.outputs is not None
    every = np.concatenate([feed["x"] for feed in feeds]).astype(np.float64)
    rows = item.sample[0] + item.mean[0]
    places = [int(np.argmin(np.abs(every - row).sum(axis=1))) for row in rows]
    assert len(set(places)) == 50
    assert places[0] < 3
    assert places[-1] > 96
    np.testing.assert_allclose(rows, every[places], atol=1e-5)
    made = every @ as_matrix(layer, layer.array())[0].T
    np.testing.assert_allclose(
        item.outputs.covariance[0], np.cov(made.T, bias=True), rtol=1e-5, atol=1e-5
    )
    assert item.outputs.rows == 100


def test_the_cache_keeps_them_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "WIDEST", 1)
    prepared, feeds = prepared_of(conv((4, 6, 9, 8), (9, 2, 3, 3), group=3))
    (layer,) = prepared.layers
    item = calibrated(prepared, [layer], feeds)[layer.name]
    cache, key = Cache(tmp_path), key_of("k")
    write_statistics(cache, key, {layer.name: item}, seconds=10.0)
    again = read_statistics(cache, key, [layer])[layer.name]
    assert item.sample is not None
    assert item.outputs is not None
    assert again.sample is not None
    assert again.outputs is not None
    for a, b in (
        (item.mean, again.mean),
        (item.covariance, again.covariance),
        (item.sample, again.sample),
        (item.outputs.mean, again.outputs.mean),
        (item.outputs.covariance, again.outputs.covariance),
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert (item.rows, item.outputs.rows) == (again.rows, again.outputs.rows)
    arrays = cache.read_arrays("statistics", key)
    for word in ("sample", "output-covariance", "rows", "output-mean"):
        broken = {**arrays, f"{word} {layer.name}": np.ones((2, 2))}
        cache.write_arrays("statistics", key, broken)
        assert read_statistics(cache, key, [layer]) == {}


def test_sequential_correction_reaches_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a conv that loses much the Gemm is regressed on what it is given now."""
    monkeypatch.setattr(wide_module, "SAMPLED_ROWS", 400)
    model = wide_network()
    prepared, _ = prepared_of(model, rows=1)
    feeds, held = few_directions(100, 1), few_directions(40, 2)
    statistics = calibrated(prepared, list(prepared.layers), feeds)
    by_name = {
        name: Choice(choose_passes((method,))[0], rank)
        for name, method, rank in (("conv", "channel-svd", (2,)), ("fc", "svd", (8,)))
    }
    factors = {}
    for name, choice in by_name.items():
        layer = prepared.layer(name)
        made = fit_to_inputs(choice.graph_pass, layer, choice.rank, statistics[name], THOROUGH)
        made = tuple(f.astype(np.float32) for f in made)
        rest = rest_of(choice.graph_pass, layer, choice.rank, made)
        factors[name] = Factored(made, bias_shift(rest, statistics[name].mean))
    plain = Variant(by_name, factors)
    parts = tuple({name: array[None] for name, array in feed.items()} for feed in feeds)
    samples = Samples("feeds", parts, None, np.arange(len(feeds)), prepared.specs)
    fixed = correct(prepared, plain, statistics, samples, 0, Silent(), Originals(prepared))
    assert fixed.factors["conv"] is factors["conv"]
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(fixed.factors["fc"].factors, factors["fc"].factors, strict=True)
    )
    wanted = outputs(model, held)
    lost = []
    for variant in (plain, fixed):
        written = to_proto(
            rewrite(prepared.model, prepared.shapes, variant.choices, variant.factors)
        )
        lost.append(np.linalg.norm(np.stack(outputs(written, held)) - np.stack(wanted)))
    assert lost[1] < 0.97 * lost[0]
