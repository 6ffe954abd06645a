"""Every pass on layers of any shape, drawn by hypothesis: at full rank nothing changes."""

from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.registry import choose_passes
from onnxlr.model.protobuf import to_proto
from onnxlr.rewrite.replace import rewrite
from tests.support.builders import (
    layers_of,
    make_model,
    node,
    relative,
    replaced,
    run,
)
from tests.support.pass_cases import (
    CONV,
    CP,
    TOLERANCE,
    assert_same_outputs,
    conv,
    feed_for,
    gemm,
    matmul,
    rand,
    the_layer,
)


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
    (before,) = run(model, feed)
    assume(min(before.shape) > 0)
    source, shapes, (layer,) = layers_of(model)
    assert layer.refusal is None
    for method in (*CONV, *CP):
        graph_pass = choose_passes((method,))[0]
        if graph_pass.refuse(layer) is not None:
            continue
        rank = graph_pass.full_rank(layer)
        choice = {layer.name: Choice(graph_pass, rank)}
        factored = {layer.name: Factored(graph_pass.factorize(layer, rank))}
        written = to_proto(rewrite(source, shapes, choice, factored))
        onnx.checker.check_model(written, full_check=True)
        (after,) = run(written, feed)
        assert relative(before, after) <= TOLERANCE


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tiles_at_full_rank(data: st.DataObject) -> None:
    """Grids beyond the default one, on convolutions and products from either side."""
    p, q = data.draw(st.integers(1, 3), "p"), data.draw(st.integers(1, 3), "q")
    m, n = p * data.draw(st.integers(1, 3), "m"), q * data.draw(st.integers(1, 3), "n")
    group = data.draw(st.integers(1, 2), "group")
    lead = [data.draw(st.integers(1, 3)) for _ in range(data.draw(st.integers(0, 2), "lead"))]
    kind = data.draw(st.sampled_from(["conv", "left", "right", "gemm"]))
    if kind == "conv":
        shape = (group * m, n, data.draw(st.integers(1, 3), "kh"), 2)
        model = conv((2, group * n, 5, 4), shape, group=group)
    elif kind == "left":
        model = matmul((*lead, n, 3), (m, n), left=True)
    elif kind == "right":
        model, (m, n), (p, q) = matmul((*lead, 3, n), (n, m)), (n, m), (q, p)
    else:
        model = make_model(
            [node("Gemm", ["x", "w", "c"], "y", transB=1, alpha=0.5, beta=2.0)],
            {"x": (3, n)},
            ["y"],
            {"w": rand(m, n), "c": rand(m, seed=1)},
        )
    layer, graph_pass = the_layer(model, "tiled-svd")
    columns = n * int(np.prod(layer.shape[2:]))
    rank = (min(m // p, columns // q), p, q)
    assume(graph_pass.refuse(layer) is None)
    assert graph_pass.misfit(layer, rank) is None
    assert_same_outputs(model, replaced(model, "tiled-svd", rank), TOLERANCE)


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
    assert_same_outputs(model, replaced(model, "svd", graph_pass.full_rank(layer)), TOLERANCE)


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
    assert_same_outputs(model, replaced(model, "svd", graph_pass.full_rank(layer)), TOLERANCE)
