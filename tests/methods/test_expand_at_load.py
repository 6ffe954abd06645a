"""Factors multiplied back when a session loads: any weight, a smaller file, the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

import onnxlr
from onnxlr.decompose import join_tiles
from onnxlr.layers.macs import count_macs
from onnxlr.model.load import load
from onnxlr.prepare.prepared import prepare
from tests.support.builders import Array, low_rank, make_model, node, relative, run

RNG = np.random.default_rng(0)


def recurrent(op: str, gates: int, *, state: bool = False) -> onnx.ModelProto:
    """A recurrent layer in both directions: weights of the input have rank 4, or of the state."""
    sizes = {"w": 24, "r": 16}
    weights = {
        name: RNG.standard_normal((2, gates * 16, size)).astype(np.float32)
        for name, size in sizes.items()
    }
    low = "r" if state else "w"
    weights[low] = low_rank(RNG, 2 * gates * 16, sizes[low], 4).reshape(2, gates * 16, -1)
    return make_model(
        [
            onnx.helper.make_node(
                op, ["x", "w", "r"], ["y"], name="cell", hidden_size=16, direction="bidirectional"
            )
        ],
        {"x": (5, 2, 24)},
        ["y"],
        weights,
    )


def across_positions() -> onnx.ModelProto:
    """A Conv whose 16 × 16 tiles, which cut across kernel positions, have rank 2."""
    tiles = np.stack([low_rank(RNG, 16, 16, 2) for _ in range(2 * 18)])
    kernel = join_tiles(tiles.reshape(1, 2, 18, 16, 16)).reshape(32, 32, 3, 3)
    return make_model(
        [node("Conv", ["x", "w"], "y", "c")], {"x": (1, 32, 6, 6)}, ["y"], {"w": kernel}
    )


def tied() -> onnx.ModelProto:
    """One table of rank 4 that is looked up, and that projects back."""
    return make_model(
        [
            node("Cast", ["x"], "i", to=onnx.TensorProto.INT64),
            node("Gather", ["w", "i"], "e"),
            node("Transpose", ["w"], "t", perm=[1, 0]),
            node("MatMul", ["e", "t"], "y"),
        ],
        {"x": (3, 4)},
        ["y"],
        {"w": low_rank(RNG, 40, 24, 4)},
    )


def in_a_body() -> onnx.ModelProto:
    """A product in both branches of an If, its weight a Constant of one branch."""
    w = low_rank(RNG, 24, 24, 4)
    graphs = []
    for i in (0, 1):
        inner = onnx.numpy_helper.from_array(w if i else w[:, ::-1].copy())
        nodes = [
            onnx.helper.make_node("Constant", [], [f"w{i}"], value=inner),
            node("MatMul", ["x", f"w{i}"], f"o{i}"),
        ]
        out = onnx.helper.make_tensor_value_info(f"o{i}", 1, [4, 24])
        graphs.append(onnx.helper.make_graph(nodes, f"g{i}", [], [out]))
    return make_model(
        [
            node("ReduceSum", ["x"], "s", keepdims=0),
            node("Greater", ["s", "zero"], "c"),
            onnx.helper.make_node("If", ["c"], ["y"], then_branch=graphs[0], else_branch=graphs[1]),
        ],
        {"x": (4, 24)},
        ["y"],
        {"zero": np.zeros((), np.float32)},
    )


@pytest.mark.parametrize(
    ("build", "replaced"),
    [
        (lambda: recurrent("LSTM", 4), {"w": (4, 1, 1)}),
        (lambda: recurrent("GRU", 3), {"w": (4, 1, 1)}),
        (lambda: recurrent("RNN", 1), {"w": (4, 1, 1)}),
        (across_positions, {"c": (2, 2, 18)}),
        (tied, {"w": (4, 1, 1)}),
        (in_a_body, {"o0": (4, 1, 1), "o1": (4, 1, 1)}),
    ],
    ids=["LSTM", "GRU", "RNN", "tiles across positions", "tied table", "bodies"],
)
def test_any_weight_is_stored_as_factors(
    build: Callable[[], onnx.ModelProto], replaced: dict[str, Any], tmp_path: Path
) -> None:
    """Smaller, equal, and folded by the runtime to the very nodes it ran before."""
    model = build()
    onnx.save(model, tmp_path / "in.onnx")
    result = onnxlr.optimize(
        tmp_path / "in.onnx",
        tmp_path / "out.onnx",
        method="expand-at-load",
        rank="exact",
        expand_at_load=True,
    )
    decided = [d.rank for d in result.plan.replaced]
    assert decided == list(replaced.values())
    assert result.report.output.bytes < result.report.input.bytes
    for seed in (1, 2):  # both branches of the If
        x = np.abs(np.random.default_rng(seed).standard_normal(shape(model))).astype(np.float32)
        feed = {"x": x * (-1) ** seed if build is in_a_body else x}
        for a, b in zip(run(model, feed), run(result.model, feed), strict=True):
            assert relative(a, b) < 1e-5
    assert folded(tmp_path / "in.onnx") == folded(tmp_path / "out.onnx")
    assert all(d.macs_after == d.macs_before for d in result.plan.decisions)
    assert result.report.output.macs == result.report.input.macs
    written = prepare(load(tmp_path / "out.onnx"), feed=None)
    assert count_macs(written.model, written.shapes) == result.report.input.macs
    again = onnxlr.apply(result.plan, tmp_path / "in.onnx")
    assert again.SerializeToString() == result.model.SerializeToString()


def shape(model: onnx.ModelProto) -> tuple[int, ...]:
    return tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)


def folded(path: Path) -> list[str]:
    """The operators that are left once the runtime has folded constants."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".folded.onnx"))
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    bodies = [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    operators = (n.op_type for g in (graph, *bodies) for n in g.node)
    return sorted(op for op in operators if op != "Constant")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_multiplied_in_single(dtype: Any, tmp_path: Path) -> None:
    """No CPU has a half-precision product to fold: it would run each time."""
    w = low_rank(np.random.default_rng(0), 48, 32, 4).astype(dtype)
    stored = onnx.TensorProto.FLOAT16 if dtype is np.float16 else onnx.TensorProto.BFLOAT16
    model = make_model(
        [node("Cast", ["w"], "v", to=onnx.TensorProto.FLOAT), node("MatMul", ["x", "v"], "y")],
        {"x": (4, 48)},
        ["y"],
        {"w": w.astype(np.float16)},
    )
    model.graph.initializer[0].CopyFrom(
        onnx.helper.make_tensor("w", stored, w.shape, w.view(np.uint16).tobytes(), raw=True)
    )
    onnx.save(model, tmp_path / "in.onnx")
    result = onnxlr.optimize(
        tmp_path / "in.onnx", tmp_path / "out.onnx", method="expand-at-load", rank="4", max_drop=1
    )
    (decision,) = result.plan.decisions
    assert decision.decision == "expand-at-load"
    factors = [t for t in result.model.graph.initializer if "expand" in t.name]
    assert {t.data_type for t in factors} == {stored}
    assert folded(tmp_path / "in.onnx") == folded(tmp_path / "out.onnx")
    step = {np.float16: 2**-11, ml_dtypes.bfloat16: 2**-8}[dtype]
    # The error that is told includes the rounding of the factors, and no more.
    assert 0.1 * step < (decision.error or 0) < 2 * step


def test_a_chain_that_pays_comes_before_factors_that_only_save_bytes() -> None:
    model = recurrent("LSTM", 4, state=True)
    wide: Array = low_rank(RNG, 512, 512, 8)
    more = make_model([node("MatMul", ["z", "v"], "u", "fc")], {"z": (8, 512)}, ["u"], {"v": wide})
    for name in ("node", "input", "output", "initializer"):
        getattr(model.graph, name).extend(getattr(more.graph, name))
    result = onnxlr.optimize(
        model, expand_at_load=True, metric="rel-error", max_drop=0.01, measure=False
    )
    assert {d.name: d.decision for d in result.plan.replaced} == {
        "r": "expand-at-load",
        "fc": "svd",
    }


def test_without_the_flag_weights_of_a_state_stay() -> None:
    rows = onnxlr.optimize(recurrent("LSTM", 4, state=True), rank="exact").plan.decisions
    reason = {d.name: d.reason for d in rows}["r"]
    assert reason.startswith("no method replaces what meets the state of LSTM: --expand-at-load")
