"""Every pass on every kind of layer: full-rank identity, planted ranks, theory, counts."""

from collections.abc import Callable
from functools import cache, reduce

import numpy as np
import onnx
import pytest
import tensorly.decomposition

import onnxlr
from onnxlr.candidates.candidate import Candidate
from onnxlr.candidates.fits import auto_candidates, break_even, fit_methods, named_candidates
from onnxlr.decompose import parse_rank, tucker2
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import count_macs
from onnxlr.methods.base import GraphPass
from onnxlr.methods.cost import chain_macs, chain_params, weight_error
from onnxlr.methods.registry import installed_passes
from onnxlr.model.load import load
from onnxlr.prepare.shapes import observe_shapes
from onnxlr.system.session import ONE_CPU_THREAD
from onnxlr.types import Rank
from tests.support.builders import (
    Array,
    layers_of,
    linear,
    low_rank,
    make_model,
    node,
    relative,
    replaced,
    run,
)
from tests.support.networks import planted
from tests.support.pass_cases import (
    CASES,
    CONV,
    CP,
    ROWS,
    TOLERANCE,
    assert_same_outputs,
    conv,
    feed_for,
    gather,
    gemm,
    matmul,
    rand,
    the_layer,
)


@pytest.mark.parametrize(("case", "method"), ROWS)
def test_full_rank_is_the_identity(case: str, method: str) -> None:
    model = CASES[case][0]()
    layer, graph_pass = the_layer(model, method)
    assert_same_outputs(model, replaced(model, method, graph_pass.full_rank(layer)), TOLERANCE)


def open_model(
    nodes: list[onnx.NodeProto], dims: list[int | str], *weight: int
) -> Callable[[int], onnx.ModelProto]:
    """A model of x with these dimensions and a weight of that shape, in the opset asked for."""
    return lambda opset: make_model(nodes, {"x": dims}, ["y"], {"w": rand(*weight)}, opset=opset)


PRODUCT = [node("MatMul", ["x", "w"], "y")]


INTEGERS = node("Cast", ["x"], "i", to=7)


EMPTY: dict[str, tuple[Callable[[int], onnx.ModelProto], tuple[int, ...], tuple[str, ...]]] = {
    "rows": (open_model(PRODUCT, ["n", 8], 8, 12), (0, 8), ("svd", "tiled-svd")),
    "rows of a batch": (
        open_model(PRODUCT, ["b", "n", 8], 8, 12),
        (1, 0, 8),
        ("svd", "tiled-svd"),
    ),
    "images": (
        open_model([node("Conv", ["x", "w"], "y")], ["n", 8, 9, 9], 8, 8, 3, 3),
        (0, 8, 9, 9),
        (*CONV, *CP),
    ),
    "indices": (
        open_model([INTEGERS, node("Gather", ["w", "i"], "y", axis=0)], ["b", "n"], 11, 6),
        (1, 0),
        ("embedding-svd", "tiled-svd"),
    ),
    "indices of columns": (
        open_model([INTEGERS, node("Gather", ["w", "i"], "y", axis=1)], ["b", "n"], 4, 11, 3),
        (1, 0),
        ("embedding-svd",),
    ),
}


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("case", EMPTY)
def test_nothing_in_nothing_out(case: str, opset: int) -> None:
    """An empty batch: nothing was detected, no tokens are left; also as ONNX Runtime fuses it."""
    make, shape, methods = EMPTY[case]
    model = make(opset)
    for method in methods:
        if (method, opset, shape[0]) == ("tiled-svd", 9, 1):  # there only the first axis may be
            continue
        layer, graph_pass = the_layer(model, method)
        other = replaced(model, method, graph_pass.full_rank(layer))
        feed = {"x": np.zeros(shape, np.float32)}
        for optimized in (False, True):
            before, after = (run(m, feed, optimized=optimized)[0] for m in (model, other))
            assert after.shape == before.shape, method


@cache
def factorized(case: str, method: str) -> tuple[Rank, tuple[Array, ...]]:
    """The factors of a case at a rank in the middle: of a CP, which takes long, at a low one."""
    layer, graph_pass = the_layer(CASES[case][0](), method)
    ladder = graph_pass.ladder(layer)
    rank = below(layer, graph_pass, (3 * len(ladder) // 4) if method in CP else len(ladder) // 2)
    return rank, graph_pass.factorize(layer, rank)


@pytest.mark.parametrize(("case", "method"), ROWS)
def test_counts_are_those_of_the_written_graph(case: str, method: str) -> None:
    model = CASES[case][0]()
    layer, graph_pass = the_layer(model, method)
    if method in CP:
        rank, ready = factorized(case, method)
        written = replaced(model, method, rank, factors=ready)
    else:
        rank = below(layer, graph_pass, 1)
        written = replaced(model, method, rank)
    graph, shapes, _ = layers_of(written)
    # Inference doesn't see through the Shape of the oldest opsets; a run does.
    names = [v for n in written.graph.node for v in n.output if v not in shapes]
    shapes |= observe_shapes(graph, names, feed_for(written), ONE_CPU_THREAD) if names else {}
    factors = [t for t in written.graph.initializer if method.replace("-", "_") in t.name]
    stored = [t for t in factors if "_constant" not in t.name]
    assert sum(int(np.prod(t.dims)) for t in stored) == chain_params(layer, graph_pass, rank)
    assert tuple(tuple(t.dims) for t in stored) == graph_pass.factor_shapes(layer, rank)
    other = sum(
        int(np.prod(shapes[n.output[0]])) * shapes[n.input[0]][-1]
        for n in model.graph.node
        if case == "matmul-shared" and n.output[0] == "y"
    )
    assert (
        count_macs(load(written).model, shapes)
        == (chain_macs(layer, graph_pass, rank) or 0) + other
    )
    _, shapes, _ = layers_of(model)
    assert count_macs(load(model).model, shapes) == (layer.macs or 0) + other


@pytest.mark.parametrize(("case", "method"), ROWS)
def test_the_chain_is_as_far_from_the_weight_as_the_report_says(case: str, method: str) -> None:
    """Measured on the weight that the written factors multiply to, in the original's place."""
    layer, graph_pass = the_layer(CASES[case][0](), method)
    rank, factors = factorized(case, method)
    product = multiplied(layer, method, factors, rank)
    np.testing.assert_allclose(graph_pass.compose(layer, rank, factors), product, atol=1e-12)
    error = relative(layer.array(), product)
    reported = weight_error(layer, graph_pass, rank, factors)
    assert reported == pytest.approx(error, rel=1e-6, abs=1e-7)
    if method in CP:
        return  # no spectrum tells the error
    (fit,), _ = fit_methods(layer, (graph_pass,))
    tails = [s.errors[r] for s, r in zip(fit.spectra, rank, strict=False)]
    if len(tails) == 1:  # Eckart and Young
        assert error == pytest.approx(tails[0], rel=1e-6, abs=1e-7)
    else:  # De Lathauwer's bound, that holds and isn't idle
        assert 0.5 * float(np.linalg.norm(tails)) <= error <= float(np.linalg.norm(tails)) + 1e-7


def below(layer: Layer, graph_pass: GraphPass, steps: int) -> Rank:
    """A rank some steps below the full one, or the smallest."""
    ladder = graph_pass.ladder(layer)
    return ladder[max(0, len(ladder) - 1 - steps)]


def multiplied(layer: Layer, method: str, factors: tuple[Array, ...], rank: Rank) -> Array:
    """The weight that a chain stands for, by einsum from the stored factors; group by group."""
    if method == "tiled-svd":
        return multiplied_tiles(layer, factors, rank)
    if layer.kind in ("gather", "tied") and method != "svd":
        axis = layer.lookup_axis(layer.uses[0])
        lead, trail = layer.shape[:axis], layer.shape[axis + 1 :]
        q = factors[1].reshape(-1, int(np.prod(lead)), int(np.prod(trail)))
        return np.asarray(np.einsum("vr,rab->avb", factors[0], q).reshape(layer.shape))
    if method == "svd":
        return np.asarray(factors[0] @ factors[1])
    conv_like = layer.kind == "conv"
    parts = [
        # Every factor as (g, out, in, *spatial), the 1×1 ones too, which are always plain convs.
        _by_group(f, layer.group, conv_like or _is_mixing(method, i))
        for i, f in enumerate(factors)
    ]
    if method in CP:
        ends = [f.reshape(f.shape[:2]) for f in (factors[0], factors[-1])]
        lines = [f.reshape(f.shape[0], -1) for f in factors[1:-1]]
        middle = reduce(lambda a, b: np.einsum("ra,rb->rab", a, b).reshape(len(a), -1), lines)
        kernel = np.einsum("rs,rp,tr->tsp", ends[0], middle, ends[1])
        return np.asarray(
            (kernel if layer.kind == "conv" else kernel.swapaxes(0, 1)).reshape(layer.shape)
        )
    if method == "slice-svd":
        group, (outputs, inputs) = layer.group, (layer.shape[0] // layer.group, layer.shape[1])
        columns = factors[0].reshape(group, inputs, outputs, -1, layer.shape[2])
        rows = factors[1].reshape(group, outputs, inputs, columns.shape[3], -1)
        slices = np.einsum("gstra,gtsrb->gtsab", columns, rows)
        return np.asarray(slices.reshape(layer.shape))
    if method == "spatial-svd":
        vertical = parts[0].reshape(*parts[0].shape[:3], -1)
        horizontal = parts[1].reshape(*parts[1].shape[:3], -1)
        kernel = np.einsum("grsa,gtrb->gtsab", vertical, horizontal)
        group, outputs, inputs, first, rest = kernel.shape
        kernel = kernel.reshape(group, outputs, inputs, first * rest)
    else:
        flat = [p.reshape(*p.shape[:3], -1) for p in parts]
        kernel = flat[0]
        for nxt in flat[1:]:
            kernel = (
                np.einsum("grsp,gtr->gtsp", kernel, nxt[..., 0])
                if nxt.shape[-1] == 1
                else np.einsum("grs,gtrp->gtsp", kernel[..., 0], nxt)
            )
    if not conv_like:
        kernel = kernel.transpose(0, 2, 1, 3)
    return np.asarray(kernel.reshape(layer.shape))


def multiplied_tiles(layer: Layer, factors: tuple[Array, ...], rank: Rank) -> Array:
    """Tile by tile, in loops."""
    r, p, q = rank
    inner, outer = factors
    result = np.zeros(layer.shape)
    if layer.kind == "gather":
        width = layer.shape[1] // q
        for j in range(q):
            result[:, j * width : (j + 1) * width] = outer[:, j * r : (j + 1) * r] @ inner[j]
        return result
    if layer.kind == "matrix":
        use = layer.uses[0]
        inner, outer = inner.reshape(q, *inner.shape[-2:]), outer.reshape(p, *outer.shape[-2:])
        if use.weight_transposed:
            inner, outer = inner.swapaxes(1, 2), outer.swapaxes(1, 2)
        m, n = layer.shape[0] // p, layer.shape[1] // q
        for i in range(p):
            for j in range(q):
                tile = outer[i][:, j * r : (j + 1) * r] @ inner[j][i * r : (i + 1) * r]
                result[i * m : (i + 1) * m, j * n : (j + 1) * n] = tile
        return result
    group, conv_like = layer.group, layer.kind == "conv"
    first = _by_group(inner, group * q, conv_like)
    first = first.reshape(*first.shape[:3], -1)
    last = _by_group(outer, group * p, True)
    out, inputs = last.shape[1], first.shape[2]
    for g in range(group):
        for i in range(p):
            for j in range(q):
                u = last[g * p + i].reshape(out, q, r)[:, j]
                v = first[g * q + j].reshape(p, r, inputs, -1)[i]
                tile = np.einsum("tr,rsp->tsp", u, v).reshape(out, inputs, *layer.shape[2:])
                t0, s0 = i * out, j * inputs
                if conv_like:
                    t0 += g * out * p
                    result[t0 : t0 + out, s0 : s0 + inputs] = tile
                else:
                    s0 += g * inputs * q
                    result[s0 : s0 + inputs, t0 : t0 + out] = tile.swapaxes(0, 1)
    return result


def _is_mixing(method: str, index: int) -> bool:
    """Whether a factor belongs to a 1×1 Conv, also in the chain of a ConvTranspose."""
    return index in {"channel-svd": (1,), "input-channel-svd": (0,), "tucker2": (0, 2)}.get(
        method, ()
    )


def _by_group(factor: Array, group: int, plain: bool) -> Array:
    first, second, *spatial = factor.shape
    array = factor.reshape(group, first // group, second, *spatial)
    return array if plain else array.swapaxes(1, 2)


@pytest.mark.parametrize("method", ["channel-svd", "input-channel-svd", "spatial-svd"])
@pytest.mark.parametrize("group", [1, 2])
def test_truncated_conv_is_the_conv_with_the_truncated_kernel(method: str, group: int) -> None:
    model = conv(
        (2, 8, 9, 8), (6, 8 // group, 3, 3), group=group, strides=[2, 1], pads=[1, 0, 1, 1]
    )
    layer, graph_pass = the_layer(model, method)
    (stack,) = graph_pass.unfoldings(layer)
    u, s, vt = np.linalg.svd(stack.astype(np.float64), full_matrices=False)
    cut = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    inputs, outputs = 8 // group, 6 // group
    kernel = {
        "channel-svd": lambda: cut,
        "input-channel-svd": lambda: cut.reshape(group, inputs, outputs, 9).transpose(0, 2, 1, 3),
        "spatial-svd": lambda: cut.reshape(group, inputs, 3, outputs, 3).transpose(0, 3, 1, 2, 4),
    }[method]().reshape(layer.shape)
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


@pytest.mark.parametrize("method", ["svd", "tiled-svd"])
def test_what_counts_nothing_may_be_anything(method: str) -> None:
    """ONNX Runtime leaves C out where beta is 0, infinite or not."""
    model = gemm(beta=0.0)
    (bias,) = (t for t in model.graph.initializer if t.name == "c")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, np.inf, np.float32), "c"))
    layer, graph_pass = the_layer(model, method)
    chained = replaced(model, method, graph_pass.full_rank(layer))
    x = {"x": rand(4, 8)}
    assert relative(run(model, x)[0], run(chained, x)[0]) < 1e-5


@pytest.mark.parametrize("method", [*CONV, *CP])
def test_planted_ranks_are_found_and_exact(method: str) -> None:
    kernel = planted(method, np.random.default_rng(3))
    model = conv((1, 10, 8, 8), kernel.shape, pads=[1, 1, 1, 1])
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(kernel, "w"))
    layer, graph_pass = the_layer(model, method)
    fits, _ = fit_methods(layer, (graph_pass,))
    candidates = named_candidates(layer, fits, parse_rank("exact"), "macs")
    assert isinstance(candidates, list), candidates
    rank = candidates[0].choice.rank
    planted_ranks = {"tucker2": (4, 5), "slice-svd": (1,), "tiled-svd": (4, 2, 2)}
    assert rank == planted_ranks.get(method, (4,))
    assert_same_outputs(model, replaced(model, method, rank), TOLERANCE)
    if min(rank) > 1:
        less = (rank[0] - 1, *(r - (method == "tucker2") for r in rank[1:]))
        lower = replaced(model, method, less)
        with pytest.raises(AssertionError):
            assert_same_outputs(model, lower, 100 * TOLERANCE)


# The MACs of algorithms from the literature, per output position of a stride-1 convolution.
FORMULAS: dict[str, Callable[[Rank], int]] = {
    "channel-svd": lambda r: r[0] * (8 * 9 + 12),
    "input-channel-svd": lambda r: r[0] * (8 + 12 * 9),
    "spatial-svd": lambda r: r[0] * (8 * 3 + 12 * 3),
    "slice-svd": lambda r: r[0] * 8 * 12 * (3 + 3),
    "cp": lambda r: r[0] * (8 + 3 + 3 + 12),
    "cp3": lambda r: r[0] * (8 + 9 + 12),
    "tiled-svd": lambda r: r[0] * r[1] * r[2] * (12 // r[1] + 8 * 9 // r[2]),
    "tucker2": lambda r: 8 * r[0] + r[0] * r[1] * 9 + r[1] * 12,
}


@pytest.mark.parametrize("method", [*CONV, *CP])
def test_counted_macs_are_the_published_formulas(method: str) -> None:
    model = conv((2, 8, 7, 7), (12, 8, 3, 3), pads=[1, 1, 1, 1])
    layer, graph_pass = the_layer(model, method)
    rank = {"tucker2": (3, 5), "tiled-svd": (3, 2, 4)}.get(method, (3,))
    assert chain_macs(layer, graph_pass, rank) == 2 * 49 * FORMULAS[method](rank)
    assert chain_params(layer, graph_pass, rank) == FORMULAS[method](rank)
    svd_layer, svd = the_layer(matmul((2, 5, 9), (9, 6)), "svd")
    assert chain_macs(svd_layer, svd, (4,)) == 10 * 4 * (9 + 6)
    table, embedding = the_layer(gather((3, 4)), "embedding-svd")
    assert chain_macs(table, embedding, (2,)) == 12 * 2 * 6


def test_a_pointwise_conv_strides_before_its_channels_are_multiplied() -> None:
    """Of the positions that a 1×1 kernel steps over nothing is computed, in either conv."""
    model = conv((1, 6, 9, 8), (8, 6, 1, 1), strides=[2, 2])
    layer, graph_pass = the_layer(model, "input-channel-svd")
    assert chain_macs(layer, graph_pass, (3,)) == 5 * 4 * 3 * (6 + 8)


def tucker_beside_tensorly(kernel: Array, ranks: tuple[int, int]) -> float:
    """Our error over tensorly's, both by higher-order orthogonal iteration."""
    v, core, u = tucker2(kernel, ranks)
    np.testing.assert_allclose(u.T @ u, np.eye(ranks[1]), atol=1e-12)
    ours = float(np.linalg.norm(kernel - np.einsum("ta,abp,sb->tsp", u, core, v)))
    squares = np.linalg.norm(kernel) ** 2 - np.linalg.norm(core) ** 2
    assert ours**2 == pytest.approx(squares, rel=1e-9, abs=1e-18)
    (their_core, factors), _ = tensorly.decomposition.partial_tucker(
        kernel, rank=[ranks[1], ranks[0]], modes=[0, 1], n_iter_max=500, tol=1e-12
    )
    theirs = np.linalg.norm(kernel - np.einsum("abp,ta,sb->tsp", their_core, *factors))
    return ours / float(theirs)


def test_tucker_is_no_worse_than_tensorly() -> None:
    ratios = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((24, 16, 9))
        decaying = np.einsum("tsp,t,s->tsp", noise, 0.8 ** np.arange(24), 0.85 ** np.arange(16))
        assert tucker_beside_tensorly(decaying, (6, 8)) <= 1 + 1e-5
        # On pure noise both end in some local minimum: neither may be worse on the average.
        ratios.append(tucker_beside_tensorly(noise, (2, 5)))
    assert np.mean(ratios) <= 1.001


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


def test_tucker2_takes_over_where_a_cp_degenerates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is the limit of rank-2 sums whose parts diverge (De Silva & Lim 2008)."""
    a, b = np.linalg.qr(np.random.default_rng(3).standard_normal((9, 2)))[0].T
    parts = ((a, a, b), (a, b, a), (b, a, a))
    kernel = sum(np.einsum("i,j,k->ijk", *part) for part in parts)
    model = conv((1, 9, 6, 6), (9, 9, 3, 3))
    stored = np.asarray(kernel, dtype=np.float32).reshape(9, 9, 3, 3)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(stored, "w"))
    layer, graph_pass = the_layer(model, "cp3")
    fits, _ = fit_methods(layer, (graph_pass,))
    stable = named_candidates(layer, fits, parse_rank("2"), "macs")[0]
    assert isinstance(stable, Candidate)
    assert stable.choice.graph_pass is graph_pass
    monkeypatch.setattr("onnxlr.decompose.outer_products._DEGENERATE", 10.0)
    instead = named_candidates(layer, fits, parse_rank("2"), "macs")[0]
    assert isinstance(instead, Candidate)
    assert instead.choice.graph_pass.name == "tucker2"
    assert instead.params <= chain_params(layer, graph_pass, (2,))
    assert "cp3 of rank 2 degenerates" in instead.note
    assert instead.note.endswith("tucker2 instead")
    decision = onnxlr.optimize(model, method="cp3", rank="2", max_drop=1).plan.decisions[0]
    assert (decision.decision, decision.rank) == ("tucker2", instead.choice.rank)
    assert decision.reason.startswith("cp3 of rank 2 degenerates")
    monkeypatch.setattr("onnxlr.decompose.outer_products._DEGENERATE", 0.0)
    searched = auto_candidates(layer, fits, 0.5, "macs")[0]
    assert isinstance(searched, Candidate)
    assert searched.choice.graph_pass.name == "tucker2"
    assert searched.note.endswith("tucker2 instead")


@pytest.mark.parametrize(
    ("model", "method", "reason"),
    [
        (
            matmul((4, 7), (7, 5)),
            "channel-svd",
            "not MatMul",
        ),
        (
            matmul((4, 7), (7, 5)),
            "input-channel-svd",
            "not MatMul",
        ),
        (conv((1, 6, 9, 8), (8, 6, 3, 3)), "svd", "svd replaces MatMul and Gemm, not Conv"),
        (matmul((4, 7), (7,)), "svd", "the weight is a vector of 7, which has rank 1 already"),
        (
            matmul((7,), (3, 7, 5)),
            "svd",
            "the weight is a stack of matrices and multiplies a vector",
        ),
        (
            matmul((5,), (3, 7, 5), left=True),
            "svd",
            "the weight is a stack of matrices and multiplies a vector",
        ),
    ],
)
def test_refusals_carry_a_reason(model: onnx.ModelProto, method: str, reason: str) -> None:
    layer, graph_pass = the_layer(model, method)
    assert (graph_pass.refuse(layer) or "").endswith(reason)


@pytest.mark.parametrize("case", CASES)
def test_every_pair_is_supported_or_refused_with_a_reason(case: str) -> None:
    """The table names all that a method does, and the method says why it does no more."""
    model, methods = CASES[case][0](), CASES[case][1]
    (layer,) = layers_of(model)[2]
    for name, installed in installed_passes().items():
        reason = installed.graph_pass.refuse(layer)
        if installed.graph_pass.at_load:
            assert reason is None
        else:
            assert (reason is None) == (name in methods), f"{name}: {reason}"
            assert reason is None or (name in reason and len(reason) > 20)


@pytest.mark.parametrize(("case", "method"), ROWS)
def test_break_even_is_the_last_rank_that_saves(case: str, method: str) -> None:
    layer, graph_pass = the_layer(CASES[case][0](), method)
    limit = break_even(layer, graph_pass)
    full = graph_pass.full_rank(layer)

    def saves(rank: Rank) -> bool:
        macs = chain_macs(layer, graph_pass, rank)
        assert macs is not None
        assert layer.macs is not None
        fewer = macs < layer.macs or layer.kind == "gather"
        return chain_params(layer, graph_pass, rank) < layer.params and fewer

    ladder = reversed(graph_pass.ladder(layer))
    assert limit == next((r for r in ladder if saves(r)), tuple(0 for _ in full))


def test_a_square_matrix_breaks_even_below_half() -> None:
    layer, graph_pass = the_layer(linear(rand(16, 16)), "svd")
    assert break_even(layer, graph_pass) == (7,)
