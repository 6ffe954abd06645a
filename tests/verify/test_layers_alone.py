"""--verify layers: each replaced layer alone, beside what numpy makes of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.errors import UsageError
from onnxlr.methods.choice import Factored
from onnxlr.rewrite.factorizer import Factorizer
from onnxlr.rewrite.variant import Variant
from onnxlr.verify import layers_alone
from tests.support.builders import abort, linear, low_rank, make_model, node
from tests.support.networks import images, network, noisy


def worst_of(model: onnx.ModelProto, **options: Any) -> onnxlr.Result:
    return onnxlr.optimize(model, verify="layers", target="params", **options)


def test_the_error_is_that_of_the_layer_alone() -> None:
    """For white inputs the output's error is that of the weight, up to what 64 rows tell."""
    weight = noisy(8, 0.3)
    model = linear(weight, rows=4096)
    result = worst_of(model, rank=8, max_drop=1)
    values = np.linalg.svd(weight, compute_uv=False)
    expected = float(np.sqrt(np.sum(values[8:] ** 2) / np.sum(values**2)))
    quality = result.report.quality
    assert quality is not None
    assert quality.metric == "rel-error"
    assert quality.optimized == pytest.approx(expected, rel=0.03)
    assert result.report.speed is None
    assert "each replaced layer alone" in result.report.verified
    assert result.report.to_dict()["metric"]["original"] == 0.0


def test_a_layer_outside_the_limit_is_put_back() -> None:
    rng = np.random.default_rng(1)
    model = make_model(
        [node("MatMul", ["x", "a"], "h", "good"), node("MatMul", ["h", "b"], "y", "bad")],
        {"x": (32, 64)},
        ["y"],
        {"a": noisy(8, 0.0), "b": rng.standard_normal((48, 48)).astype(np.float32)},
    )
    result = worst_of(model, rank=8, max_drop=0.01)
    rows = {d.name: d for d in result.plan.decisions}
    assert rows["good"].decision == "svd"
    assert rows["bad"].decision == "keep"
    assert "rel-error would rise to" in rows["bad"].reason
    assert result.report.quality is not None
    assert result.report.quality.optimized < 1e-5


def test_the_whole_model_is_never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any) -> None:
        raise AssertionError("the whole model was opened")

    monkeypatch.setattr("onnxlr.jobs.pipeline.open_with_feeding", opened)
    monkeypatch.setattr("onnxlr.verify.layers_alone.model_of_values", opened)
    assert worst_of(network(), rank=4, max_drop=1).plan.replaced


def test_the_rank_follows_the_limit() -> None:
    """Without a named rank the weight's error stays within what is allowed."""
    weight = noisy(24, 0.02)
    ranks = []
    for limit in (0.9, 0.1):
        result = worst_of(linear(weight, rows=512), max_drop=limit)
        (row,) = result.plan.replaced
        assert row.error is not None
        assert row.error <= limit
        ranks.append((row.rank or (0,))[0])
    assert ranks[0] < ranks[1]


def test_a_table_is_looked_up_all_over() -> None:
    """The table is indexed along its second axis, and only its first entries have a low rank."""
    table = np.random.default_rng(0).standard_normal((24, 400)).astype(np.float32)
    table[:, :24] = 1000 * noisy(1, 0.0)[:24, :24]
    model = make_model(
        [node("Gather", ["t", "ids"], "y", "emb", axis=1)],
        {"ids": ("n",)},
        ["y"],
        {"t": table},
        dtype="int64",
    )
    model.graph.output[0].type.tensor_type.elem_type = 1
    result = worst_of(model, rank=4, max_drop=0.05)
    assert not result.plan.replaced


@pytest.mark.parametrize("opset", [7, 9, 17])
def test_products_of_every_opset_are_run(opset: int, tmp_path: Path) -> None:
    """A Gemm had to have a bias before opset 11; its inputs know few directions, its weight all."""
    rng = np.random.default_rng(0)
    model = make_model(
        [node("Gemm", ["x", "w", "b"], "y", "fc")],
        {"x": ("n", 64)},
        ["y"],
        {"w": noisy(48, 1.0), "b": np.ones(48, np.float32)},
        opset=opset,
    )
    x = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 64))
    np.savez(tmp_path / "d.npz", x=x.astype(np.float32))
    result = worst_of(model, rank=8, max_drop=0.05, data=tmp_path / "d.npz")
    (row,) = result.plan.replaced
    assert row.error is not None
    assert row.error > 0.5
    assert result.report.quality is not None
    assert result.report.quality.fidelity.rel_error < 1e-5


@pytest.mark.parametrize("shape", ["n", 8])
def test_layers_of_unknown_shape_are_compared_too(shape: str | int, tmp_path: Path) -> None:
    """Reshape to a shape that only a run shows: nothing can be inferred behind it."""
    weight = noisy(5, 0.0)
    model = make_model(
        [
            node("Reshape", ["x", "s"], "h"),
            node("MatMul", ["h", "w"], "y", "fc"),
        ],
        {"x": (shape, 64), "s": (2,)},
        ["y"],
        {"w": weight},
    )
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    result = worst_of(model, rank=5, max_drop=1e-4)
    assert [d.decision for d in result.plan.replaced] == ["svd"]
    onnxlr.apply(result.plan, model, tmp_path / "o.onnx")


def test_with_data_real_inputs_are_compared(tmp_path: Path) -> None:
    data = tmp_path / "d.npz"
    np.savez(data, x=images(64, 0))
    drawn = worst_of(network(), rank=4, max_drop=1)
    real = worst_of(network(), rank=4, max_drop=1, data=data)
    assert drawn.report.quality is not None
    assert real.report.quality is not None
    # What was predicted for real inputs, and not what drawn ones give.
    predicted = max(d.output_error or 0.0 for d in real.plan.replaced)
    assert real.report.quality.optimized == pytest.approx(predicted, rel=0.05)
    assert real.report.quality.optimized < 0.9 * drawn.report.quality.optimized
    assert "d.npz" in real.report.verified


def test_convolutions_of_every_kind(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = {
        "a": rng.standard_normal((8, 4, 3)).astype(np.float32),
        "b": rng.standard_normal((8, 8, 4)).astype(np.float32),
        "t": rng.standard_normal((50, 12)).astype(np.float32),
    }
    model = make_model(
        [
            node("Conv", ["x", "a"], "h", "grouped", group=2, pads=[1, 1], dilations=[1]),
            node("ConvTranspose", ["h", "b"], "y", "up", strides=[2]),
            node("Gather", ["t", "i"], "z", "table"),
        ],
        {"x": (2, 8, 20), "i": (7,)},
        ["y", "z"],
        weights,
    )
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    result = onnxlr.optimize(model, tmp_path / "o.onnx", verify="layers", rank=2, max_drop=1)
    by_layer = {d.name: d for d in result.plan.replaced}
    assert {"grouped", "up", "table"} <= set(by_layer)
    prepared = onnxlr.inspect(tmp_path / "o.onnx")
    assert prepared


@pytest.mark.parametrize("flag", ["labels", "metric"])
def test_what_needs_the_whole_model_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag} needs a run"):
        onnxlr.optimize(network(), verify="layers", **{flag: "rel-error"})  # type: ignore[arg-type]


def test_inputs_that_cannot_be_observed_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that runs may crash the runtime once it has more outputs."""
    monkeypatch.delenv("ONNXLR_TRIAL")
    monkeypatch.setattr(layers_alone, "_seen", abort)
    model = linear(low_rank(np.random.default_rng(0), 64, 48, 3), name="fc")
    result = onnxlr.optimize(model, verify="layers", rank=3, target="params")
    assert [d.name for d in result.plan.replaced] == ["fc"]


def test_a_wrong_factor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per cent wrong is one per cent of error."""
    plain = Factorizer.variant

    def scaled(self: Factorizer, *arguments: Any) -> Variant:
        variant = plain(self, *arguments)
        factors = {}
        for name, factored in variant.factors.items():
            first, *rest = factored.factors
            wrong = first.astype(np.float32) * np.float32(1.01)
            factors[name] = Factored((wrong, *rest), factored.shift)
        return replace(variant, factors=factors)

    monkeypatch.setattr(Factorizer, "variant", scaled)
    result = worst_of(linear(noisy(5, 0.0), rows=256), rank=5, max_drop=1)
    assert result.report.quality is not None
    assert result.report.quality.optimized == pytest.approx(0.01, rel=0.02)
