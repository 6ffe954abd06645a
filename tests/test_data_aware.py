"""Whole runs with data: budgets met or refused, factors that data decide, plans that replay."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr import assess
from onnxlr.cli import main
from onnxlr.model import load
from onnxlr.plan import Plan
from tests.builders import Array, make_model, node, relative, run


def network(seed: int = 0) -> onnx.ModelProto:
    """Three convs and a product whose inputs lie in few directions, and one without a bias."""
    rng = np.random.default_rng(seed)
    sizes = (3, 12, 16, 16)
    nodes, weights = [], {}
    x = "x"
    for i in (1, 2, 3):
        shape = (sizes[i], sizes[i - 1], 3, 3)
        weights[f"w{i}"] = rng.standard_normal(shape) * np.sqrt(2 / (9 * sizes[i - 1]))
        inputs = [x, f"w{i}"]
        if i != 2:
            weights[f"b{i}"] = 0.1 * rng.standard_normal(sizes[i])
            inputs.append(f"b{i}")
        nodes += [
            node("Conv", inputs, f"c{i}", f"conv{i}", pads=[1, 1, 1, 1]),
            node("Relu", [f"c{i}"], f"r{i}"),
        ]
        x = f"r{i}"
    weights["v"] = rng.standard_normal((16 * 64, 24)) / 32
    nodes += [node("Flatten", [x], "f"), node("MatMul", ["f", "v"], "y", "fc")]
    stored = {n: a.astype(np.float32) for n, a in weights.items()}
    return make_model(nodes, {"x": ("n", 3, 8, 8)}, ["y"], stored)


def images(count: int, seed: int) -> Array:
    """Smooth pictures: mixtures of five patterns."""
    patterns = np.random.default_rng(7).standard_normal((5, 3, 8, 8))
    mix = np.random.default_rng(seed).standard_normal((count, 5))
    return np.asarray(np.einsum("nk,kchw->nchw", mix, patterns), dtype=np.float32) + 0.5


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.npz"
    np.savez(path, x=images(128, 0))
    return path


def test_a_share_of_the_multiply_accumulates_is_met(data: Path) -> None:
    model = network()
    damages = []
    for share in (0.8, 0.4):
        result = onnxlr.optimize(
            model, data=data, target=f"macs={share}", metric="rel-error", max_drop=1
        )
        report = result.report
        assert report.output.macs <= share * report.input.macs
        assert report.output.macs > 0.75 * share * report.input.macs
        assert report.quality is not None
        damages.append(report.quality.optimized)
    assert damages == sorted(damages)
    assert damages[0] < 0.75 * damages[-1]


@pytest.mark.parametrize("goal", ["params", "bytes"])
def test_a_share_of_the_size_is_met(goal: str, data: Path) -> None:
    result = onnxlr.optimize(
        network(), data=data, target=f"{goal}=0.5", metric="rel-error", max_drop=1
    )
    before, after = result.report.input, result.report.output
    assert getattr(after, goal) <= 0.5 * getattr(before, goal)


def test_a_budget_that_cannot_be_met_is_exit_code_3(data: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "o.onnx"
    onnx.save(network(), source)

    def optimize(*options: str) -> Any:
        command = ("optimize", str(source), str(out), "--data", str(data), *options)
        return CliRunner().invoke(main, command, catch_exceptions=False)

    done = optimize("--target", "macs=0.001", "--max-drop", "1")
    assert done.exit_code == 3
    assert "--target macs=0.001 can't be met" in done.stderr
    assert "of the model's macs" in done.stderr
    done = optimize("--target", "macs=0.3", "--metric", "rel-error", "--max-drop", "0.0001")
    assert done.exit_code == 3
    assert "outside the accuracy allowed" in done.stderr
    assert "the limit is 0.0001" in done.stderr
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(onnxlr.BudgetError):
        onnxlr.optimize(source, data=data, target="bytes=0.001", max_drop=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "macs=1.5"}, "between 0 and 1"),
        ({"target": "macs=x"}, "between 0 and 1"),
        ({"target": "flops=0.5"}, "latency, macs, params or bytes"),
        ({"target": "macs=0.5", "rank": 8}, "--rank 8 names them"),
        ({"target": "macs=0.5", "verify": "none"}, "needs a run"),
    ],
)
def test_targets_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(onnxlr.UsageError, match=words):
        onnxlr.optimize(network(), **options)


def test_data_make_better_factors_than_the_weight_alone(data: Path) -> None:
    """The same methods and ranks; what differs is what the factors are fitted to."""
    model = network()
    held_out = {"x": images(64, 99)}
    apart = {}
    for samples in (None, data):
        result = onnxlr.optimize(
            model, data=samples, rank=6, method=("channel-svd", "svd"), max_drop=1
        )
        assert {d.decision for d in result.plan.replaced} == {"channel-svd", "svd"}
        apart[samples] = relative(run(model, held_out)[0], run(result.model, held_out)[0])
        lost = [d.output_error for d in result.plan.replaced]
        assert all((o is None) == (samples is None) for o in lost)
    assert apart[data] < 0.7 * apart[None]


def test_sequential_correction_helps_and_says_so(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage() -> tuple[float, onnxlr.Result]:
        result = onnxlr.optimize(
            network(), data=data, rank=4, metric="rel-error", max_drop=1, method="channel-svd"
        )
        assert result.report.quality is not None
        return result.report.quality.fidelity.rel_error, result

    corrected, result = damage()
    assert result.plan.calibration is not None
    assert result.plan.calibration.sequential == 64
    assert any("corrected in sequence" in note for note in result.report.notes)
    monkeypatch.setattr(assess, "SEQUENCE_SAMPLES", 0)
    own, plain = damage()
    assert plain.plan.calibration is not None
    assert plain.plan.calibration.sequential == 0
    assert corrected < 0.97 * own


def test_a_plan_fitted_to_data_replays_to_the_byte(data: Path, tmp_path: Path) -> None:
    source, out, again = (tmp_path / name for name in ("net.onnx", "o.onnx", "p.onnx"))
    onnx.save(network(), source)
    result = onnxlr.optimize(
        source, out, data=data, target="macs=0.5", metric="rel-error", max_drop=1
    )
    text = result.plan.to_json()
    plan = Plan.from_json(text)
    assert plan == result.plan
    assert plan.calibration is not None
    assert plan.calibration.half
    onnxlr.apply(plan, source, again)
    assert out.read_bytes() == again.read_bytes()
    assert load(out).model.metadata_props["onnxlr_plan"] == plan.digest

    moved = tmp_path / "moved.npz"
    data.rename(moved)
    with pytest.raises(onnxlr.UsageError, match=r"no such file.*--data"):
        onnxlr.apply(plan, source, again)
    onnxlr.apply(plan, source, again, data=moved)
    assert out.read_bytes() == again.read_bytes()
    np.savez(data, x=images(128, 1))
    with pytest.raises(onnxlr.UsageError, match="doesn't hold the samples"):
        onnxlr.apply(plan, source, again)
    broken = json.loads(text) | {"calibration": {"data": 3}}
    with pytest.raises(onnxlr.UsageError, match="is no onnxlr plan"):
        Plan.from_json(json.dumps(broken))


def test_calibration_may_lack_the_labels_that_validation_has(tmp_path: Path) -> None:
    model, x = network(), images(64, 5)
    labels = run(model, {"x": x})[0].argmax(-1)
    np.savez(tmp_path / "c.npz", x=images(64, 6))
    np.savez(tmp_path / "v.npz", x=x, label=labels)
    result = onnxlr.optimize(
        model,
        data=tmp_path / "c.npz",
        validation=tmp_path / "v.npz",
        labels="label",
        target="macs=0.8",
        max_drop=0.5,
    )
    assert result.report.quality is not None
    assert result.report.quality.metric == "top1"
    assert result.report.quality.original == 1.0
    assert result.plan.calibration is not None
    assert not result.plan.calibration.half
