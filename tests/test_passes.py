"""Every pass on every kind of layer: full-rank identity, planted ranks, theory, counts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from onnxlr.decompose import spectrum, tail_error
from onnxlr.graph_pass import GraphPass, Rank, choose_passes
from onnxlr.layers import Layer, count_macs
from onnxlr.model import load
from onnxlr.plan import break_even
from tests.builders import (
    Array,
    full_rank,
    layers_of,
    linear,
    low_rank,
    make_model,
    node,
    relative,
    replaced,
    run,
)

TOLERANCE = 1e-5
CONV = ("channel-svd", "input-channel-svd")


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matmul(x: tuple[int, ...], w: tuple[int, ...], *, left: bool = False) -> onnx.ModelProto:
    order = ["w", "x"] if left else ["x", "w"]
    return make_model([node("MatMul", order, "y")], {"x": x}, ["y"], {"w": rand(*w)})


def gemm(
    *,
    left: bool = False,
    flip_w: int = 0,
    flip_x: int = 0,
    bias: bool = True,
    alpha: float = 1.0,
    beta: float = 1.0,
    opset: int = 17,
) -> onnx.ModelProto:
    k, out, rows = 7, 5, 4
    w = rand(*((k, out) if left == bool(flip_w) else (out, k)))
    if left:  # y = w' x: (out, k)(k, rows)
        w, x = rand(*((k, out) if flip_w else (out, k))), (rows, k) if flip_x else (k, rows)
        flags: dict[str, Any] = {"transA": flip_w, "transB": flip_x}
        inputs, c = ["w", "x"], rand(out, rows, seed=1)
    else:
        w, x = rand(*((out, k) if flip_w else (k, out))), (k, rows) if flip_x else (rows, k)
        flags = {"transA": flip_x, "transB": flip_w}
        inputs, c = ["x", "w"], rand(out, seed=1)
    weights = {"w": w} | ({"c": c} if bias else {})
    inputs += ["c"] if bias else []
    gemm_node = node("Gemm", inputs, "y", alpha=alpha, beta=beta, **flags)
    return make_model([gemm_node], {"x": x}, ["y"], weights, opset=opset)


def conv(
    x: tuple[int, ...], w: tuple[int, ...], *, bias: bool = True, opset: int = 17, **attributes: Any
) -> onnx.ModelProto:
    weights = {"w": rand(*w)} | ({"b": rand(w[0], seed=1)} if bias else {})
    inputs = ["x", "w"] + (["b"] if bias else [])
    return make_model(
        [node("Conv", inputs, "y", "conv", **attributes)], {"x": x}, ["y"], weights, opset=opset
    )


def viewed(op: str, **attributes: Any) -> onnx.ModelProto:
    """A weight behind a view."""
    shape = (5, 7) if op == "Transpose" else (7, 5)
    return make_model(
        [node(op, ["w"], "v", **attributes), node("MatMul", ["x", "v"], "y")],
        {"x": (4, 7)},
        ["y"],
        {"w": rand(*shape)},
    )


def shared() -> onnx.ModelProto:
    """One weight as W, as Wᵀ through a Transpose, and in Gemms with both flags."""
    return make_model(
        [
            node("MatMul", ["x", "w"], "a"),
            node("Transpose", ["w"], "wt", perm=[1, 0]),
            node("MatMul", ["a", "wt"], "b"),
            node("Gemm", ["b", "wt"], "c", transB=1),
            node("Gemm", ["c", "w"], "d", transB=1, alpha=0.5),
            node("MatMul", ["w", "z"], "e"),
            node("MatMul", ["wt", "e"], "f"),
            node("MatMul", ["w", "f"], "g"),
            node("MatMul", ["d", "g"], "y"),
        ],
        {"x": (4, 7), "z": (5, 3)},
        ["y"],
        {"w": rand(7, 5)},
    )


CASES: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[str, ...]]] = {
    "matmul": (lambda: matmul((4, 7), (7, 5)), ("svd",)),
    "matmul-3d": (lambda: matmul((2, 4, 7), (7, 5)), ("svd",)),
    "matmul-4d": (lambda: matmul((2, 3, 4, 7), (7, 5)), ("svd",)),
    "matmul-vector": (lambda: matmul((7,), (7, 5)), ("svd",)),
    "matmul-left": (lambda: matmul((5, 4), (7, 5), left=True), ("svd",)),
    "matmul-left-3d": (lambda: matmul((2, 5, 4), (7, 5), left=True), ("svd",)),
    "matmul-left-vector": (lambda: matmul((5,), (7, 5), left=True), ("svd",)),
    "matmul-batched": (lambda: matmul((3, 4, 7), (3, 7, 5)), ("svd",)),
    "matmul-batched-broadcast": (lambda: matmul((4, 7), (2, 3, 7, 5)), ("svd",)),
    "matmul-batched-left": (lambda: matmul((3, 5, 4), (3, 7, 5), left=True), ("svd",)),
    "matmul-transposed": (lambda: viewed("Transpose"), ("svd",)),
    "matmul-identity": (lambda: viewed("Identity"), ("svd",)),
    "matmul-shared": (shared, ("svd",)),
    **{
        f"gemm-{'left-' if left else ''}{flip_w}{flip_x}{'-bias' if bias else ''}-opset{opset}": (
            partial(
                gemm,
                left=left,
                flip_w=flip_w,
                flip_x=flip_x,
                bias=bias,
                opset=opset,
                alpha=0.7,
                beta=1.3,
            ),
            ("svd",),
        )
        for left in (False, True)
        for flip_w in (0, 1)
        for flip_x in (0, 1)
        for bias, opset in ((True, 7), (True, 17), (False, 11))
    },
    "conv": (lambda: conv((2, 6, 9, 8), (8, 6, 3, 3), pads=[1, 1, 1, 1]), CONV),
    "conv-no-bias": (lambda: conv((2, 6, 9, 8), (8, 6, 3, 3), bias=False), CONV),
    "conv-stride": (lambda: conv((1, 6, 9, 8), (8, 6, 3, 3), strides=[2, 3]), CONV),
    "conv-dilation": (lambda: conv((1, 6, 9, 12), (8, 6, 3, 3), dilations=[2, 3]), CONV),
    "conv-asymmetric": (lambda: conv((1, 6, 9, 8), (8, 6, 3, 2), pads=[0, 2, 1, 0]), CONV),
    "conv-same-upper": (
        lambda: conv((1, 6, 9, 8), (8, 6, 4, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
        CONV,
    ),
    "conv-same-lower": (
        lambda: conv((1, 6, 9, 8), (8, 6, 4, 3), auto_pad="SAME_LOWER", strides=[2, 1]),
        CONV,
    ),
    "conv-valid": (lambda: conv((1, 6, 9, 8), (8, 6, 3, 3), auto_pad="VALID"), CONV),
    "conv-grouped": (lambda: conv((2, 6, 9, 8), (9, 2, 3, 3), group=3, strides=[2, 1]), CONV),
    "conv-depthwise": (lambda: conv((1, 6, 9, 8), (12, 1, 3, 3), group=6), CONV),
    "conv-pointwise": (lambda: conv((1, 6, 9, 8), (8, 6, 1, 1)), CONV),
    "conv-pointwise-stride-pad": (
        lambda: conv((1, 6, 9, 8), (8, 6, 1, 1), strides=[2, 2], pads=[1, 0, 2, 1]),
        CONV,
    ),
    "conv-1d": (lambda: conv((2, 6, 20), (8, 6, 5), strides=[2], pads=[2, 1]), CONV),
    "conv-1d-long": (lambda: conv((2, 1, 300), (8, 1, 64), strides=[4]), CONV),
    "conv-3d": (lambda: conv((1, 4, 5, 6, 7), (6, 4, 3, 2, 3), strides=[1, 2, 1]), CONV),
    "conv-opset7": (lambda: conv((1, 6, 9, 8), (8, 6, 3, 3), opset=7), CONV),
}
ROWS = [(case, method) for case, (_, methods) in CASES.items() for method in methods]


def feed_for(model: onnx.ModelProto, seed: int = 7) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        v.name: rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for v in model.graph.input
    }


def the_layer(model: onnx.ModelProto, method: str) -> tuple[Layer, GraphPass]:
    (layer,) = layers_of(model)[2]
    assert layer.refusal is None
    return layer, choose_passes((method,))[0]


def assert_same_outputs(model: onnx.ModelProto, other: onnx.ModelProto, limit: float) -> None:
    feed = feed_for(model)
    for before, after in zip(run(model, feed), run(other, feed), strict=True):
        assert relative(before, after) <= limit


@pytest.mark.parametrize(("case", "method"), ROWS)
def test_full_rank_is_the_identity(case: str, method: str) -> None:
    model = CASES[case][0]()
    layer, graph_pass = the_layer(model, method)
    assert_same_outputs(model, replaced(model, method, full_rank(layer, graph_pass)), TOLERANCE)


@pytest.mark.parametrize(("case", "method"), ROWS)
def test_counts_are_those_of_the_written_graph(case: str, method: str) -> None:
    model = CASES[case][0]()
    layer, graph_pass = the_layer(model, method)
    rank: Rank = tuple(max(1, r - 1) for r in full_rank(layer, graph_pass))
    written = replaced(model, method, rank)
    _, shapes, _ = layers_of(written)
    factors = [t for t in written.graph.initializer if method.replace("-", "_") in t.name]
    stored = [t for t in factors if not t.name.endswith("_constant")]
    assert sum(int(np.prod(t.dims)) for t in stored) == graph_pass.params(layer, rank)
    assert tuple(tuple(t.dims) for t in stored) == graph_pass.factor_shapes(layer, rank)
    other = sum(
        int(np.prod(shapes[n.output[0]])) * shapes[n.input[0]][-1]
        for n in model.graph.node
        if case == "matmul-shared" and n.output[0] == "y"
    )
    assert count_macs(load(written).model, shapes) == (graph_pass.macs(layer, rank) or 0) + other
    _, shapes, _ = layers_of(model)
    assert count_macs(load(model).model, shapes) == (layer.macs or 0) + other


@pytest.mark.parametrize(("case", "method"), ROWS)
def test_the_weight_error_is_the_spectrum_s_tail(case: str, method: str) -> None:
    layer, graph_pass = the_layer(CASES[case][0](), method)
    rank: Rank = tuple(max(1, r // 2) for r in full_rank(layer, graph_pass))
    (unfolding,) = graph_pass.unfoldings(layer)
    assert unfolding.shape == graph_pass.unfolding_shapes(layer)[0]
    predicted = tail_error(spectrum(unfolding))[rank[0]]
    # The weight that the chain stands for, seen through impulses: rows of the identity.
    left, right = np.linalg.svd(unfolding.astype(np.float64), full_matrices=False)[::2]
    best = (left[..., : rank[0]] * _top(unfolding, rank[0])) @ right[:, : rank[0]]
    error = np.linalg.norm(unfolding - best) / np.linalg.norm(unfolding)
    assert predicted == pytest.approx(error, rel=1e-6, abs=1e-12)


def _top(stack: Array, rank: int) -> Array:
    values = np.linalg.svd(stack.astype(np.float64), compute_uv=False)[:, :rank]
    return np.asarray(values[:, None, :])


@pytest.mark.parametrize("method", CONV)
@pytest.mark.parametrize("group", [1, 2])
def test_truncated_conv_is_the_conv_with_the_truncated_kernel(method: str, group: int) -> None:
    model = conv(
        (2, 8, 9, 8), (6, 8 // group, 3, 3), group=group, strides=[2, 1], pads=[1, 0, 1, 1]
    )
    layer, graph_pass = the_layer(model, method)
    (stack,) = graph_pass.unfoldings(layer)
    u, s, vt = np.linalg.svd(stack.astype(np.float64), full_matrices=False)
    cut = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    kernel = (
        cut.reshape(6, 8 // group, 3, 3)
        if method == "channel-svd"
        else (
            cut.reshape(group, 8 // group, 6 // group, 9).transpose(0, 2, 1, 3).reshape(layer.shape)
        )
    )
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    expected.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(kernel.astype(np.float32), "w")
    )
    assert_same_outputs(expected, replaced(model, method, (2,)), TOLERANCE)


def test_truncated_matmul_is_the_matmul_with_the_truncated_weight() -> None:
    weight = rand(12, 9)
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    cut = ((u[:, :3] * s[:3]) @ vt[:3]).astype(np.float32)
    assert_same_outputs(linear(cut), replaced(linear(weight), "svd", (3,)), TOLERANCE)


@pytest.mark.parametrize("method", CONV)
def test_planted_conv_rank_is_exact(method: str) -> None:
    kernel = low_rank(np.random.default_rng(3), 12, 10 * 9, 4).reshape(12, 10, 3, 3)
    if method == "input-channel-svd":
        kernel = kernel.transpose(1, 0, 2, 3).copy()
    model = conv((1, kernel.shape[1], 8, 8), kernel.shape, pads=[1, 1, 1, 1])
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(kernel, "w"))
    assert_same_outputs(model, replaced(model, method, (4,)), TOLERANCE)
    with pytest.raises(AssertionError):
        assert_same_outputs(model, replaced(model, method, (3,)), 100 * TOLERANCE)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_conv_at_full_rank(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3), "dims")
    group = data.draw(st.integers(1, 3), "group")
    inputs, outputs = (group * data.draw(st.integers(1, 4), n) for n in ("inputs", "outputs"))
    axes = range(dims)
    kernel = [data.draw(st.integers(1, 4), "kernel") for _ in axes]
    attributes: dict[str, Any] = {"group": group}
    strides = [data.draw(st.integers(1, 3), "strides") for _ in axes]
    dilations = [data.draw(st.integers(1, 2), "dilations") for _ in axes]
    auto_pad = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if data.draw(st.booleans(), "explicit strides") or any(s > 1 for s in strides):
        attributes["strides"] = strides
    if auto_pad == "NOTSET":
        attributes["pads"] = [data.draw(st.integers(0, 2), "pads") for _ in range(2 * dims)]
    else:
        attributes["auto_pad"] = auto_pad
    if auto_pad.startswith("SAME"):
        dilations = [1] * dims  # the runtime refuses dilated SAME pads
    if any(d > 1 for d in dilations):
        attributes["dilations"] = dilations
    if data.draw(st.booleans(), "kernel_shape"):
        attributes["kernel_shape"] = kernel
    spatial = [
        data.draw(st.integers((k - 1) * d + 1, 9), "size")
        for k, d in zip(kernel, dilations, strict=True)
    ]
    shape = (outputs, inputs // group, *kernel)
    model = conv(
        (data.draw(st.integers(1, 2), "batch"), inputs, *spatial),
        shape,
        bias=data.draw(st.booleans(), "bias"),
        opset=data.draw(st.sampled_from([7, 11, 17, 21])),
        **attributes,
    )
    feed = feed_for(model)
    assume(min(run(model, feed)[0].shape) > 0)
    for method in CONV:
        layer, graph_pass = the_layer(model, method)
        written = replaced(model, method, full_rank(layer, graph_pass))
        assert_same_outputs(model, written, TOLERANCE)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_product_at_full_rank(data: st.DataObject) -> None:
    k, n = data.draw(st.integers(1, 9), "k"), data.draw(st.integers(1, 9), "n")
    batch = [data.draw(st.integers(1, 3)) for _ in range(data.draw(st.integers(0, 2), "batch"))]
    x_batch = [data.draw(st.sampled_from([1, b])) for b in batch]
    w_batch = batch if data.draw(st.booleans(), "batched weight") else []
    rows = data.draw(st.integers(1, 5), "rows")
    if data.draw(st.booleans(), "left"):
        model = matmul((*x_batch, k, rows), (*w_batch, n, k), left=True)
    else:
        model = matmul((*x_batch, rows, k), (*w_batch, k, n))
    layer, graph_pass = the_layer(model, "svd")
    assert_same_outputs(model, replaced(model, "svd", full_rank(layer, graph_pass)), TOLERANCE)


@settings(max_examples=80, deadline=None)
@given(
    left=st.booleans(),
    flip_w=st.integers(0, 1),
    flip_x=st.integers(0, 1),
    bias=st.booleans(),
    alpha=st.floats(-3, 3, width=32),
    beta=st.floats(-3, 3, width=32),
)
def test_any_gemm_at_full_rank(
    left: bool, flip_w: int, flip_x: int, bias: bool, alpha: float, beta: float
) -> None:
    model = gemm(left=left, flip_w=flip_w, flip_x=flip_x, bias=bias, alpha=alpha, beta=beta)
    layer, graph_pass = the_layer(model, "svd")
    assert_same_outputs(model, replaced(model, "svd", full_rank(layer, graph_pass)), TOLERANCE)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_factors_keep_the_weight_s_type(dtype: str) -> None:
    weight = low_rank(np.random.default_rng(0), 24, 16, 3).astype(dtype)
    model = linear(weight, dtype=dtype)
    written = replaced(model, "svd", (3,))
    assert {onnx.numpy_helper.to_array(t).dtype.name for t in written.graph.initializer} == {dtype}
    x = np.random.default_rng(1).standard_normal((4, 24)).astype(dtype)
    limit = {"float16": 3e-3, "float64": 1e-7}[dtype]
    assert relative(run(model, {"x": x})[0], run(written, {"x": x})[0]) < limit


def test_a_cast_weight_is_stored_as_it_was() -> None:
    weight = low_rank(np.random.default_rng(0), 24, 16, 3).astype(np.float16)
    model = make_model(
        [node("Cast", ["w"], "v", to=onnx.TensorProto.FLOAT), node("MatMul", ["x", "v"], "y")],
        {"x": (4, 24)},
        ["y"],
        {"w": weight},
    )
    written = replaced(model, "svd", (3,))
    assert {t.data_type for t in written.graph.initializer} == {onnx.TensorProto.FLOAT16}
    feed = feed_for(model)
    assert relative(run(model, feed)[0], run(written, feed)[0]) < 2e-3


@pytest.mark.parametrize(
    ("model", "method", "reason"),
    [
        (matmul((4, 7), (7, 5)), "channel-svd", "channel-svd replaces Conv, not MatMul"),
        (
            matmul((4, 7), (7, 5)),
            "input-channel-svd",
            "input-channel-svd replaces Conv, not MatMul",
        ),
        (conv((1, 6, 9, 8), (8, 6, 3, 3)), "svd", "svd replaces MatMul and Gemm, not Conv"),
        (matmul((4, 7), (7,)), "svd", "the weight is a vector of 7, which has rank 1 already"),
        (
            matmul((7,), (3, 7, 5)),
            "svd",
            "a stack of matrices meets a vector, or an operand of unknown rank",
        ),
        (
            matmul((5,), (3, 7, 5), left=True),
            "svd",
            "a stack of matrices meets a vector, or an operand of unknown rank",
        ),
    ],
)
def test_refusals_carry_a_reason(model: onnx.ModelProto, method: str, reason: str) -> None:
    layer, graph_pass = the_layer(model, method)
    assert graph_pass.refuse(layer) == reason


@pytest.mark.parametrize(("case", "method"), ROWS)
def test_break_even_is_the_last_rank_that_saves(case: str, method: str) -> None:
    layer, graph_pass = the_layer(CASES[case][0](), method)
    limit = break_even(layer, graph_pass)

    def saves(rank: int) -> bool:
        macs = graph_pass.macs(layer, (rank,))
        assert macs is not None
        assert layer.macs is not None
        return graph_pass.params(layer, (rank,)) < layer.params and macs < layer.macs

    ranks = range(1, full_rank(layer, graph_pass)[0] + 1)
    assert limit == max((r for r in ranks if saves(r)), default=0)


def test_a_square_matrix_breaks_even_below_half() -> None:
    layer, graph_pass = the_layer(linear(rand(16, 16)), "svd")
    assert break_even(layer, graph_pass) == 7
