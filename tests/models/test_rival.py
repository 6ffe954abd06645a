"""The comparison with structured pruning by another tool."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from models.zoo.models import ZooError
from models.zoo.rival import Measured, as_fast, first_feeds, pruned, unbeaten
from tests.support.builders import make_model, node


def test_of_what_is_as_fast_the_closest_is_compared() -> None:
    ours = [Measured("a", 1.1, 0.01), Measured("b", 1.3, 0.03), Measured("c", 1.4, 0.02)]
    assert as_fast(ours, Measured("x", 1.2, 0.5)) is ours[2]
    assert as_fast(ours, Measured("x", 1.1, 0.5)) is ours[0]
    assert as_fast(ours, Measured("x", 1.5, 0.5)) is None


def test_only_models_that_none_is_as_fast_as_at_no_more_loss_are_timed() -> None:
    figures = [(0.02, 8.0), (0.0, 10.0), (0.01, 11.0), (0.03, None), (0.04, 8.0), (0.05, 7.0)]
    points: list[Any] = [SimpleNamespace(loss=loss, ms=ms) for loss, ms in figures]
    assert [p.loss for p in unbeaten(points)] == [0.0, 0.02, 0.05]


def test_pruning_gets_samples_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.eye(3, dtype=np.float32)
    onnx.save(
        make_model([node("MatMul", ["x", "w"], "y")], {"x": (1, 3)}, ["y"], {"w": weight}),
        tmp_path / "in.onnx",
    )
    np.savez(tmp_path / "x.npz", x=np.arange(300, dtype=np.float32).reshape(100, 3))
    seen: dict[str, Any] = {}

    def prune(model: onnx.ModelProto, feeds: Any, **options: Any) -> onnx.ModelProto:
        seen.update(feeds=feeds, **options)
        return model

    monkeypatch.setitem(
        sys.modules, "onnxsim", SimpleNamespace(apply_structured_wanda_pruning=prune)
    )
    feeds = first_feeds(tmp_path / "x.npz")
    out = pruned(tmp_path / "in.onnx", feeds, 0.25, tmp_path)
    onnx.checker.check_model(onnx.load(out))
    assert (seen["sparsity"], len(seen["feeds"])) == (0.25, 32)
    assert seen["feeds"][1]["x"].tolist() == [[3, 4, 5]]


def test_without_the_other_tool_the_remedy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    with pytest.raises(ZooError, match="pip install onnxsim"):
        pruned(tmp_path / "in.onnx", [], 0.5, tmp_path)
