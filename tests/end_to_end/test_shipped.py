"""The models and samples that ship: what the README's first command relies on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxlr
from tests.support.limits import FEW

MODELS = Path(__file__).parent.parent.parent / "models"
SAMPLES = MODELS / "fashion-samples.npz"


@pytest.mark.parametrize(("name", "accuracy"), [("mlp", 4494 / 5000), ("cnn", 4614 / 5000)])
def test_accuracy_on_the_samples_is_what_the_readme_says(name: str, accuracy: float) -> None:
    path = MODELS / f"fashion-{name}.onnx"
    onnx.checker.check_model(path, full_check=True)
    result = onnxlr.compare(path, path, data=SAMPLES, labels="label")
    assert result.quality.metric == "top1"
    assert result.quality.original == pytest.approx(accuracy, abs=1.5 / 5000)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_search_shrinks_them_within_the_limit(
    tmp_path: Path, few_images: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    effort = replace(FEW, ranks=2, fit_samples=64, corrected_rungs=1, sequence_samples=32)
    monkeypatch.setattr("onnxlr.api.functions.LIMITS", effort)
    out = tmp_path / "out.onnx"
    path = MODELS / f"fashion-{name}.onnx"
    report = onnxlr.optimize(
        path, out, data=few_images, labels="label", target="params", max_drop=0.03
    ).report
    assert report.quality is not None
    assert report.quality.drop <= 0.03 + 1e-12
    assert report.output.params < 0.6 * report.input.params
    assert report.output.macs < report.input.macs
    assert out.stat().st_size == report.output.bytes
    assert np.isfinite(report.quality.fidelity.rel_error)


def test_they_are_small() -> None:
    assert sum(p.stat().st_size for p in (*MODELS.glob("*.onnx"), SAMPLES)) < 8_000_000
