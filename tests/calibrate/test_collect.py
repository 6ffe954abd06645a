"""Statistics of inputs: what they predict of a layer's output is what ONNX Runtime measures."""

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxlr.calibrate import collect as collect_module
from onnxlr.calibrate import statistics as statistics_module
from onnxlr.calibrate.collect import calibrate
from onnxlr.calibrate.statistics import Statistics, weight_only_reason
from onnxlr.candidates.fitting import THOROUGH, bias_shift, fit_to_inputs, output_error, rest_of
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.registry import choose_passes
from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare import opening
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.prepare.samples import load_samples
from onnxlr.progress import Silent
from onnxlr.rewrite.replace import rewrite
from onnxlr.system.pool import Pool
from onnxlr.system.session import ONE_CPU_THREAD, Feed
from onnxlr.types import Rank
from tests.support.builders import make_model, node
from tests.support.calibration import by_channel, calibrated, outputs, prepared_of, without_bias
from tests.support.pass_cases import conv, gemm, matmul, rand, transposed


def transposed_into_gemm() -> onnx.ModelProto:
    """ONNX Runtime takes the Transpose into the Gemm, and can't give out what lies between."""
    return make_model(
        [
            node("Transpose", ["x"], "t", perm=[1, 0]),
            node("Transpose", ["w"], "v", perm=[1, 0]),
            node("Gemm", ["t", "v"], "y", "fc", transA=1),
        ],
        {"x": (4, 8)},
        ["y"],
        {"w": rand(6, 8)},
    )


CASES: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "conv": (lambda: conv((4, 6, 9, 8), (8, 6, 3, 3), pads=[1, 1, 1, 1]), "spatial-svd"),
    "stride": (lambda: conv((4, 6, 9, 8), (8, 6, 3, 3), strides=[2, 3]), "channel-svd"),
    "dilation": (lambda: conv((4, 6, 9, 12), (8, 6, 3, 3), dilations=[2, 3]), "tucker2"),
    "asymmetric": (lambda: conv((4, 6, 9, 8), (8, 6, 3, 2), pads=[0, 2, 1, 0]), "spatial-svd"),
    "upper": (
        lambda: conv((4, 6, 9, 8), (8, 6, 4, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
        "channel-svd",
    ),
    "lower": (
        lambda: conv((4, 6, 9, 8), (8, 6, 4, 3), auto_pad="SAME_LOWER", strides=[2, 1]),
        "input-channel-svd",
    ),
    "empty word": (
        lambda: conv((4, 6, 9, 8), (8, 6, 3, 3), auto_pad="", pads=[1, 0, 2, 1]),
        "spatial-svd",
    ),
    "valid": (lambda: conv((4, 6, 9, 8), (8, 6, 3, 3), auto_pad="VALID"), "tiled-svd"),
    "grouped": (lambda: conv((4, 6, 9, 8), (9, 2, 3, 3), group=3, strides=[2, 1]), "spatial-svd"),
    "gemm behind a transpose": (transposed_into_gemm, "svd"),
    "no bias": (lambda: conv((4, 6, 9, 8), (8, 6, 3, 3), bias=False), "cp3"),
    "1-d": (lambda: conv((4, 6, 20), (8, 6, 5), strides=[2], pads=[2, 1]), "channel-svd"),
    "3-d": (lambda: conv((2, 4, 5, 6, 7), (6, 4, 3, 2, 3)), "cp"),
    "slices": (lambda: conv((4, 6, 9, 8), (8, 6, 3, 3)), "slice-svd"),
    "transposed": (lambda: transposed((4, 6, 5, 4), (6, 8, 3, 3)), "spatial-svd"),
    "transposed stride": (
        lambda: transposed((4, 6, 5, 4), (6, 8, 3, 4), strides=[2, 3], pads=[1, 0, 2, 1]),
        "channel-svd",
    ),
    "transposed dilation": (
        lambda: transposed(
            (4, 6, 5, 4), (6, 8, 3, 2), dilations=[2, 3], strides=[3, 2], output_padding=[2, 1]
        ),
        "tucker2",
    ),
    "transposed grouped": (
        lambda: transposed((4, 6, 5, 4), (6, 3, 3, 3), group=3, strides=[2, 2]),
        "channel-svd",
    ),
    "transposed upper": (
        lambda: transposed((4, 6, 5, 4), (6, 8, 4, 3), auto_pad="SAME_UPPER", strides=[1, 2]),
        "channel-svd",
    ),
    "transposed lower": (
        lambda: transposed((4, 6, 5, 4), (6, 8, 4, 3), auto_pad="SAME_LOWER", strides=[1, 2]),
        "input-channel-svd",
    ),
    "transposed shape": (
        lambda: transposed((4, 6, 5, 4), (6, 8, 4, 5), output_shape=[9, 8], strides=[2, 2]),
        "channel-svd",
    ),
    "transposed 1-d": (lambda: transposed((4, 6, 9), (6, 8, 5), strides=[2]), "channel-svd"),
    "stack": (lambda: matmul((3, 4, 7), (3, 7, 5)), "svd"),
    "stack for all": (lambda: matmul((4, 7), (3, 7, 5)), "svd"),
    "stack on the left": (lambda: matmul((2, 3, 7, 4), (3, 5, 7), left=True), "svd"),
    "matmul": (lambda: matmul((4, 8), (8, 6)), "svd"),
    "matmul 3-d": (lambda: matmul((2, 4, 8), (8, 6)), "tiled-svd"),
    "matmul left": (lambda: matmul((6, 4), (8, 6), left=True), "svd"),
    "matmul left 3-d": (lambda: matmul((2, 6, 4), (8, 6), left=True), "tiled-svd"),
    **{
        f"gemm {left} {w} {x} {bias}": (
            partial(gemm, left=left, flip_w=w, flip_x=x, bias=bias, alpha=0.7, beta=1.3),
            "svd",
        )
        for left in (False, True)
        for w in (0, 1)
        for x in (0, 1)
        for bias in (True, False)
        if not (left and bias)  # a bias on rows has another shape
    },
}


def the_fit(
    prepared: Prepared, feeds: list[Feed], method: str
) -> tuple[Layer, GraphPass, Rank, Statistics]:
    (layer,) = prepared.layers
    statistics = calibrated(prepared, [layer], feeds)[layer.name]
    (graph_pass,) = choose_passes((method,))
    ladder = graph_pass.ladder(layer)
    return layer, graph_pass, ladder[min(len(ladder) // 2, 20)], statistics


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_error_is_the_measured_one(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every patch counts and the bias is corrected, they agree to float32's precision."""
    monkeypatch.setattr(statistics_module, "_ROWS", 10**6)
    monkeypatch.setattr(statistics_module, "_MOST_ROWS", 10**9)
    model, method = CASES[case][0](), CASES[case][1]
    prepared, feeds = prepared_of(model)
    layer, graph_pass, rank, statistics = the_fit(prepared, feeds, method)
    plain = graph_pass.factorize(layer, rank)
    fitted = fit_to_inputs(graph_pass, layer, rank, statistics, THOROUGH)
    predicted = []
    bare = without_bias(model)
    for factors in (plain, fitted):
        rest = rest_of(graph_pass, layer, rank, factors)
        shift = bias_shift(rest, statistics.mean)
        written = to_proto(
            rewrite(
                prepared.model,
                prepared.shapes,
                {layer.name: Choice(graph_pass, rank)},
                {layer.name: Factored(factors, shift)},
            )
        )
        onnx.checker.check_model(written, full_check=True)
        before, after = outputs(model, feeds), outputs(written, feeds)
        apart = sum(float(np.sum((a - b) ** 2)) for a, b in zip(before, after, strict=True))
        # What the covariance measures the whole by: the output about its mean, without its bias.
        flat = by_channel(layer, outputs(bare, feeds))
        whole = float(np.sum((flat - flat.mean(axis=1, keepdims=True)) ** 2))
        predicted.append(output_error(layer, rest, statistics))
        assert predicted[-1] == pytest.approx(np.sqrt(apart / whole), rel=2e-3, abs=2e-5)
        means = [by_channel(layer, ys).mean(axis=1) for ys in (before, after)]
        np.testing.assert_allclose(means[0], means[1], atol=2e-4 * np.sqrt(np.mean(flat**2)))
    assert predicted[1] <= predicted[0] * (1 + 1e-9)
    assert predicted[1] < 0.999 * predicted[0] or predicted[0] < 1e-3


def test_samples_of_patches_come_close() -> None:
    """A few positions of each sample are enough to estimate the covariance of all."""
    model = conv((8, 6, 30, 30), (8, 6, 3, 3))
    prepared, feeds = prepared_of(model, rows=8)
    (layer,) = prepared.layers
    few = calibrated(prepared, [layer], feeds)[layer.name]
    again = calibrated(prepared, [layer], feeds)[layer.name]
    np.testing.assert_array_equal(few.covariance, again.covariance)
    assert few.rows < 8 * 8 * 28 * 28 / 2
    sums = statistics_module.RunningMoments(layer, 1, 0)
    sums._share = 10**9
    for feed in feeds:
        sums.add(layer.uses[0], feed["x"])
    every = sums.statistics()
    apart = np.linalg.norm(few.covariance - every.covariance) / np.linalg.norm(every.covariance)
    assert apart < 0.15


@pytest.mark.parametrize("block", [1, 100, 10**9])  # rows: each run by itself, some, all at once
def test_moments_are_summed_beside_the_caller_to_the_same_bits(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics_module, "_BLOCK", block)
    prepared, feeds = prepared_of(conv((8, 6, 30, 30), (8, 6, 3, 3)), rows=40)
    (layer,) = prepared.layers
    (use,) = layer.uses

    def summed(helper: Executor | None) -> list[bytes]:
        moments = statistics_module.RunningMoments(layer, len(feeds), 0, paired=True, helper=helper)
        for feed, other in itertools.pairwise(feeds):
            moments.add_pair(use, feed["x"], other["x"])
        assert moments.rows > 1000
        inputs, cross = moments.statistics(), moments.cross_moments()
        return [a.tobytes() for a in (inputs.mean, inputs.covariance, *cross)]

    with ThreadPoolExecutor(1) as helper:
        assert summed(helper) == summed(None)


def test_moments_of_pairs_are_those_of_all_rows() -> None:
    prepared, feeds = prepared_of(matmul((4, 6), (6, 5)), rows=40)
    (layer,) = prepared.layers
    moments = statistics_module.RunningMoments(layer, 1, 0, paired=True)
    others = [feed["x"] @ np.diag(np.arange(6)) + rand(4, 6) + 3 for feed in feeds]
    for feed, other in zip(feeds, others, strict=True):
        moments.add_pair(layer.uses[0], feed["x"], other.astype(np.float32))
    here, there = (np.concatenate(a).astype(np.float64) for a in ([f["x"] for f in feeds], others))
    mean, cross = moments.cross_moments()
    np.testing.assert_allclose(mean[0], there.mean(axis=0), rtol=1e-6)
    wanted = np.cov(there.T, here.T, bias=True)[:6, 6:]
    np.testing.assert_allclose(cross[0], wanted, rtol=1e-5, atol=1e-6)


def test_what_fails_beside_the_caller_arrives() -> None:
    prepared, feeds = prepared_of(conv((8, 6, 30, 30), (8, 6, 3, 3)), rows=8)
    (layer,) = prepared.layers
    with ThreadPoolExecutor(1) as helper:
        moments = statistics_module.RunningMoments(layer, 1, 0, helper=helper)
        moments._second = np.zeros((1, 2, 2))  # of another size
        moments.add(layer.uses[0], feeds[0]["x"])
        with pytest.raises(ValueError, match="broadcast"):
            moments.statistics()


def test_shared_weights_see_all_their_users() -> None:
    w = rand(6, 6)
    model = make_model(
        [node("MatMul", ["x", "w"], "h"), node("MatMul", ["h", "w"], "y")],
        {"x": (5, 6)},
        ["y"],
        {"w": w},
    )
    prepared, feeds = prepared_of(model)
    (layer,) = prepared.layers
    moments = calibrated(prepared, [layer], feeds)[layer.name]
    rows = np.concatenate([np.concatenate([f["x"], f["x"] @ w]) for f in feeds]).astype(np.float64)
    np.testing.assert_allclose(moments.mean[0], rows.mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        moments.covariance[0], np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-3
    )


def test_layers_that_are_not_looked_at_say_why() -> None:
    model = make_model(
        [
            node("MatMul", ["x", "w"], "h"),
            node("MatMul", ["w", "h"], "y"),
            node("MatMul", ["x", "v"], "z"),
        ],
        {"x": (6, 6)},
        ["y", "z"],
        {"w": rand(6, 6), "v": rand(6, 6)},
    )
    prepared, feeds = prepared_of(model, rows=2)
    reasons = [weight_only_reason(layer) for layer in prepared.layers]
    assert reasons == [
        "fitted to the weight: the nodes that use it multiply it from both sides",
        None,
    ]
    assert len(calibrated(prepared, prepared.layers, feeds)) == 1


def test_batches_of_layers_bound_what_is_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer a run gives the same statistics as all at once."""
    nodes = [
        node("MatMul", ["x", "a"], "h"),
        node("Relu", ["h"], "r"),
        node("MatMul", ["r", "b"], "y"),
    ]
    model = make_model(nodes, {"x": (5, 6)}, ["y"], {"a": rand(6, 7), "b": rand(7, 4)})
    prepared, feeds = prepared_of(model)
    seen: list[int] = []
    whole: Any = opening.session_of_values

    def session_of_values(model: ir.Model, names: set[str], *rest: Any) -> Any:
        seen.append(len(names))
        return whole(model, names, *rest)

    monkeypatch.setattr(collect_module, "session_of_values", session_of_values)
    moments: list[Mapping[str, Statistics]] = []
    for limit in (10**9, 1):
        monkeypatch.setattr(collect_module, "_OUTPUT_BYTES", limit)
        moments.append(calibrated(prepared, prepared.layers, feeds))
    assert seen == [2, 1, 1]
    for name in moments[0]:
        np.testing.assert_array_equal(moments[0][name].covariance, moments[1][name].covariance)


def test_the_graph_is_left_as_it_was() -> None:
    model = conv((4, 6, 9, 8), (8, 6, 3, 3))
    prepared, feeds = prepared_of(model)
    before = ir.to_proto(prepared.model).SerializeToString()
    calibrated(prepared, prepared.layers, feeds)
    assert ir.to_proto(prepared.model).SerializeToString() == before


def test_all_samples_are_looked_at_where_none_go_together(tmp_path: Path) -> None:
    """Each sample is in a file and as long as no other."""
    weight = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    nodes = [node("MatMul", ["x", "w"], "y", "fc")]
    model = make_model(nodes, {"x": ("n", "t", 8)}, ["y"], {"w": weight})
    rows = [np.random.default_rng(t).standard_normal((1, t, 8)) for t in range(3, 23)]
    for t, row in enumerate(rows):
        np.save(tmp_path / f"{t:02}.npy", row.astype(np.float32))
    prepared = prepare(load(model), feed=None)
    samples = load_samples(tmp_path, prepared.specs, None)
    assert samples.runs == 20
    moments = calibrate(prepared, prepared.layers, samples, ONE_CPU_THREAD, 0, Silent(), Pool(1))
    assert next(iter(moments.values())).rows > 0.9 * sum(row.shape[1] for row in rows)
