"""The experiment on the promise: true losses against slow oracles, its rows, and its table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import scipy.stats

from models.promise import worker
from models.promise.command import CASES, read_rows
from models.promise.table import cells, summarize
from tests.support.builders import linear
from tests.support.limits import short_runs


def row(**fields: Any) -> dict[str, Any]:
    usual = {"name": "mlp", "given": 300, "limit": 0.01, "confidence": 0.9, "loss": 0.0}
    return usual | {"replaced": 2, "macs": 0.5, "ms": 0.25} | fields


def test_true_losses_by_hand() -> None:
    rng = np.random.default_rng(0)
    before = rng.standard_normal((40, 5))
    after = before + 0.5 * rng.standard_normal((40, 5))
    labels = rng.integers(0, 5, 40)
    right = [sum(int(np.argmax(y)) == k for y, k in zip(m, labels, strict=True)) / 40
             for m in (before, after)]  # fmt: skip
    assert worker.true_loss("top1", before, after, labels) == pytest.approx(right[0] - right[1])
    error = sum(((a - b) ** 2).sum() for a, b in zip(before, after, strict=True))
    spread = sum(((a - before.mean(0)) ** 2).sum() for a in before)
    expected = float(np.sqrt(error / spread))
    assert worker.true_loss("rel-error", before, after, labels) == pytest.approx(expected)
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(before, after, strict=True)
    ]
    expected = 1 - float(np.mean(cosines))
    assert worker.true_loss("cosine", before, after, labels) == pytest.approx(expected)


def test_a_run_is_judged_on_what_was_not_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = rng.standard_normal((300, 24)).astype(np.float32)
    weight = (rng.standard_normal((24, 6)) @ rng.standard_normal((6, 12))).astype(np.float32)
    np.save(tmp_path / "image.npy", images)
    np.save(tmp_path / "label.npy", (images @ weight).argmax(1))
    onnx.save(linear(weight, rows="n"), tmp_path / "net.onnx")
    before = worker.outputs(tmp_path / "net.onnx", images)
    np.testing.assert_allclose(before, images @ weight, rtol=1e-4, atol=1e-4)
    task = {"key": "k", "name": "mlp", "metric": "top1", "given": 200, "limit": 0.5, "repeat": 3}
    task |= {"population": 300, "model": str(tmp_path / "net.onnx")}
    task |= {"options": {"target": "macs", "rank": 5, "unknown": 1}}
    with short_runs(tmp_path / "cache"):
        result = worker.run(task, tmp_path, before)
    assert result["confidence"] is not None
    assert result["macs"] < 1
    assert result["replaced"] == 1
    assert 0 < result["loss"] < 0.5  # rank 5 of 6
    others = np.random.default_rng(3).permutation(300)[200:]
    assert result["loss"] * len(others) == pytest.approx(round(result["loss"] * len(others)))


def test_the_table_counts_what_broke() -> None:
    rows = [row(loss=0.02)] * 3 + [row(loss=0.01, replaced=0, macs=1.0, ms=1.0)] + [row()] * 16
    summary = summarize(rows)
    assert (summary.runs, summary.broken, summary.unchanged) == (20, 3, 1)
    assert summary.stated == pytest.approx(0.1)
    low, high = summary.interval
    assert low == pytest.approx(scipy.stats.beta.ppf(0.025, 3, 18))
    assert high == pytest.approx(scipy.stats.beta.ppf(0.975, 4, 17))
    assert summary.holds is True
    assert (summary.macs, summary.speedup) == (0.5, 4.0)
    assert summarize([row(loss=0.02)] * 15 + [row()] * 5).holds is False
    assert summarize([row(confidence=None)]).stated is None
    assert cells("now", rows)[5] == "15.0% (3.2% to 37.9%)"


def test_rows_are_read_back(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl") == []
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row(key=i)) + "\n" for i in range(3)))
    assert [r["key"] for r in read_rows(tmp_path / "r.jsonl")] == [0, 1, 2]
    assert {metric for _, metric, _ in CASES.values()} == {"top1", "rel-error", "cosine"}
