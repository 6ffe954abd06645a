"""Layers whose inputs are chosen by values: as many as the feed leaves them, or none."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Factored
from onnxlr.rewrite import sequential
from tests.support.builders import Array, make_model, node, run

RNG = np.random.default_rng(5)
ANYTHING: Any = {"max_drop": 1, "measure": False, "target": "params"}


def rand(*shape: int) -> Array:
    return np.asarray(RNG.standard_normal(shape) / np.sqrt(shape[0]), np.float32)


def chosen(x: str, limit: float, out: str) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """Nodes that keep the rows of x whose sum is above a limit."""
    nodes = [
        node("ReduceSum", [x, "axis"], "s", keepdims=0),
        node("Greater", ["s", "limit"], "m"),
        node("Compress", [x, "m"], out, axis=0),
    ]
    return nodes, {"axis": np.array([1]), "limit": np.array(limit, np.float32)}


def rows_behind_a_layer() -> tuple[onnx.ModelProto, Array]:
    """Rows chosen by what a layer gives: the original and the factorized choose others."""
    nodes, constants = chosen("r", 25.0, "c")
    model = make_model(
        [
            node("MatMul", ["x", "a"], "h", "first"),
            node("Relu", ["h"], "r"),
            *nodes,
            node("MatMul", ["c", "b"], "d", "second"),
            node("Relu", ["d"], "e"),
            node("ReduceMean", ["e"], "y", axes=[0], keepdims=1),
        ],
        {"x": ("n", 64)},
        ["y"],
        {"a": rand(64, 64), "b": rand(64, 64)} | constants,
    )
    return model, RNG.standard_normal((400, 64)).astype(np.float32)


def no_images() -> tuple[onnx.ModelProto, Array]:
    """Crops of which every second run chooses none."""
    model = make_model(
        [
            node("ReduceMean", ["x"], "s", axes=[1, 2, 3], keepdims=0),
            node("Greater", ["s", "limit"], "m"),
            node("Compress", ["x", "m"], "c", axis=0),
            node("Conv", ["c", "k"], "b", "conv", pads=[1, 1, 1, 1]),
            node("Relu", ["b"], "r"),
            node("ReduceSum", ["r", "axes"], "y", keepdims=0),
        ],
        {"x": ("n", 16, 8, 8)},
        ["y"],
        {"k": rand(32, 16, 3, 3), "axes": np.array([0, 2, 3]), "limit": np.array(0, np.float32)},
    )
    x = RNG.standard_normal((20, 3, 16, 8, 8)).astype(np.float32) * 0.2
    x[::2] += 0.5
    x[1::2] -= 0.5
    return model, x


def always_infinite() -> tuple[onnx.ModelProto, Array]:
    """The second layer's inputs are no numbers; its outputs are cleaned."""
    model = make_model(
        [
            node("MatMul", ["x", "a"], "h", "first"),
            node("Relu", ["h"], "r"),
            node("Log", ["zero"], "infinite"),
            node("Add", ["r", "infinite"], "i"),
            node("MatMul", ["i", "b"], "d", "second"),
            node("IsNaN", ["d"], "p"),
            node("IsInf", ["d"], "q"),
            node("Or", ["p", "q"], "o"),
            node("Where", ["o", "r", "d"], "y"),
        ],
        {"x": ("n", 64)},
        ["y"],
        {"a": rand(64, 64), "b": rand(64, 64), "zero": np.array(0, np.float32)},
    )
    return model, RNG.standard_normal((400, 64)).astype(np.float32)


def no_columns() -> tuple[onnx.ModelProto, Array]:
    """A constant on the left whose inputs are empty."""
    nodes, constants = chosen("x", 2500.0, "c")
    model = make_model(
        [
            *nodes,
            node("Gemm", ["a", "c"], "g", "left", transB=1),
            node("ReduceSum", ["g", "axis"], "p", keepdims=0),
            node("MatMul", ["x", "b"], "q", "right"),
            node("Add", ["p", "q"], "y"),
        ],
        {"x": ("n", 64)},
        ["y"],
        {"a": rand(64, 64), "b": rand(64, 64)} | constants,
    )
    return model, RNG.standard_normal((400, 64)).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [4, 6])
def test_fewer_samples_than_a_fit_could_ask_for(count: int, seed: int, tmp_path: Path) -> None:
    """In directions that no sample has, factors keep to the weight, whatever rounding does."""
    rng = np.random.default_rng(seed)
    kernel = (rng.standard_normal((12, 12, 3, 3)) / 10).astype(np.float32)
    model = make_model(
        [
            node("Conv", ["x", "w"], "a", "conv"),
            node("Relu", ["a"], "b"),
            node("GlobalAveragePool", ["b"], "g"),
            node("Flatten", ["g"], "y"),
        ],
        {"x": ("n", 12, 6, 6)},
        ["y"],
        {"w": kernel},
    )
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((count, 12, 6, 6)).astype(np.float32))
    result = onnxlr.optimize(
        tmp_path / "in.onnx", data=tmp_path / "d.npz", rank="0.5", method="tucker2", **ANYTHING
    )
    (row,) = result.plan.replaced
    assert row.error is not None
    assert row.error < 2.0


@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e40])
def test_numbers_that_single_precision_lacks(scale: float, tmp_path: Path) -> None:
    """What passes a Relu is computed in single precision; the rest of the fit goes on."""
    weights = {f"w{i}": rand(64, 64).astype(np.float64) for i in range(3)}
    biases = {f"b{i}": RNG.standard_normal(64) * scale for i in range(2)}
    model = make_model(
        [
            node("Gemm", ["x", "w0", "b0"], "a", "first"),
            node("Relu", ["a"], "r"),
            node("Gemm", ["r", "w1", "b1"], "c", "second"),
            node("Relu", ["c"], "d"),
            node("Gemm", ["d", "w2"], "y", "third"),
        ],
        {"x": ("n", 64)},
        ["y"],
        weights | biases,
    )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, tmp_path / "in.onnx")
    x = RNG.standard_normal((400, 64)) * scale
    np.savez(tmp_path / "d.npz", x=x)
    result = onnxlr.optimize(tmp_path / "in.onnx", data=tmp_path / "d.npz", rank=24, **ANYTHING)
    assert len(result.plan.replaced) == 3
    (before,), (after,) = run(model, {"x": x[:32]}), run(result.model, {"x": x[:32]})
    assert np.linalg.norm(after / scale - before / scale) < 0.9 * np.linalg.norm(before / scale)


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("verify", ["full", "layers"])
def test_the_mean_behind_a_constant_on_the_left(
    squeezed: bool, verify: str, tmp_path: Path
) -> None:
    """The mean is a column behind W·X, a vector behind W·x, and left out where both may come."""
    before = node("Squeeze" if squeezed else "Relu", ["x"], "r")
    nodes = [before, node("MatMul", ["a", "r"], "y", "left")]
    dims: list[int | str] = [64, "n"] if squeezed else [64]
    model = make_model(nodes, {"x": dims}, ["y"], {"a": rand(64, 64)})
    onnx.save(model, tmp_path / "in.onnx")
    shape = (40, 64, 5) if squeezed else (400, 64)
    np.savez(tmp_path / "d.npz", x=RNG.standard_normal(shape).astype(np.float32) + 1)
    result = onnxlr.optimize(
        tmp_path / "in.onnx", data=tmp_path / "d.npz", rank=8, verify=verify, **ANYTHING
    )
    assert result.plan.replaced
    for size in [(64, 5), (64, 1), (64, 2)] if squeezed else [(64,)]:
        feed = {"x": np.ones(size, np.float32)}
        assert run(result.model, feed)[0].shape == run(model, feed)[0].shape


def test_stored_indices_that_are_listed_as_inputs(tmp_path: Path) -> None:
    """Exports of IR 3 list all initializers as inputs, though nobody feeds them."""
    constants = {"p": rand(64, 64), "at": np.arange(20)[None], "b": rand(64, 64)}
    model = make_model(
        [
            node("Gather", ["p", "at"], "q", "position"),
            node("Add", ["x", "q"], "h"),
            node("MatMul", ["h", "b"], "y", "fc"),
        ],
        {"x": ("n", 20, 64)},
        ["y"],
        constants,
    )
    model.graph.input.append(onnx.helper.make_tensor_value_info("at", 7, [1, 20]))
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "d.npz", x=RNG.standard_normal((100, 20, 64)).astype(np.float32))
    result = onnxlr.optimize(
        tmp_path / "in.onnx", data=tmp_path / "d.npz", rank=4, verify="layers", **ANYTHING
    )
    assert {d.name for d in result.plan.replaced} == {"position", "fc"}


@pytest.mark.parametrize("options", [{}, {"rank": 8}, {"rank": 8, "verify": "layers"}], ids=str)
@pytest.mark.parametrize("build", [rows_behind_a_layer, no_images, always_infinite, no_columns])
def test_it_is_optimized_all_the_same(build: Any, options: Any, tmp_path: Path) -> None:
    model, x = build()
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "d.npz", x=x)
    result = onnxlr.optimize(
        tmp_path / "in.onnx", data=tmp_path / "d.npz", max_drop=1, measure=False, **options
    )
    feed = {"x": x[0] if build is no_images else x[:16]}
    for before, after in zip(run(model, feed), run(result.model, feed), strict=True):
        assert after.shape == before.shape
        assert np.isfinite(after).all() == np.isfinite(before).all()


def test_rows_of_another_choice_are_no_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the models choose differently can't be compared: nothing is corrected by them."""
    model, x = rows_behind_a_layer()
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "d.npz", x=x)
    fitted: list[str] = []
    inner = sequential._fitted

    def watched(layer: Layer, *rest: Any) -> Factored:
        fitted.append(layer.name)
        return inner(layer, *rest)

    monkeypatch.setattr(sequential, "_fitted", watched)
    options: Any = {"rank": 8, "max_drop": 1, "measure": False}
    result = onnxlr.optimize(tmp_path / "in.onnx", data=tmp_path / "d.npz", **options)
    assert {d.name for d in result.plan.replaced} == {"first", "second"}
    assert "second" not in fitted
