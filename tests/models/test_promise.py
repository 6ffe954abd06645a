"""The experiment on the promise: true losses against slow oracles, its rows, and its table."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import scipy.stats
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

import onnxlr

pytest.importorskip("torch")

from models.promise import command, worker
from models.promise.command import CASES, Case, main, read_rows
from models.promise.table import cells, summarize, table_rows
from tests.support.builders import Array, linear

POPULATION = 300


def row(**fields: Any) -> dict[str, Any]:
    usual = {"name": "mlp", "given": 300, "limit": 0.01, "confidence": 0.9, "loss": 0.0}
    return usual | {"replaced": 2, "macs": 0.5, "ms": 0.25} | fields


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A population that a product classifies without an error, and that product."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((POPULATION, 24)).astype(np.float32)
    weight = (rng.standard_normal((24, 6)) @ rng.standard_normal((6, 12))).astype(np.float32)
    np.save(tmp_path / "image.npy", images)
    np.save(tmp_path / "label.npy", (images @ weight).argmax(1))
    onnx.save(linear(weight, rows="n"), tmp_path / "net.onnx")
    return tmp_path


def task(folder: Path, **fields: Any) -> dict[str, Any]:
    usual = {"key": "k", "name": "mlp", "metric": "top1", "given": 200, "limit": 0.5, "repeat": 3}
    usual |= {"population": POPULATION, "model": str(folder / "net.onnx")}
    return usual | {"options": {"target": "macs", "rank": 5, "unknown": 1}} | fields  # of rank 6


def loss_one_by_one(
    metric: str, before: onnx.ModelProto, after: onnx.ModelProto, images: Array, labels: Array
) -> float:
    """What is lost, image by image, and with no runtime."""
    nets = ReferenceEvaluator(before), ReferenceEvaluator(after)
    old, new = (
        [np.array(next(iter(net.run(None, {"x": x[None]}))), np.float64)[0] for x in images]
        for net in nets
    )
    total = 0.0
    if metric == "top1":
        for a, b, label in zip(old, new, labels, strict=True):
            total += int(list(a).index(max(a)) == label) - int(list(b).index(max(b)) == label)
        return total / len(images)
    if metric == "cosine":
        for a, b in zip(old, new, strict=True):
            total += 1 - float(a @ b) / float((a @ a) * (b @ b)) ** 0.5
        return total / len(images)
    mean = sum(old) / len(old)
    error = sum(float(((a - b) ** 2).sum()) for a, b in zip(old, new, strict=True))
    return float((error / sum(float(((a - mean) ** 2).sum()) for a in old)) ** 0.5)


@pytest.mark.parametrize("metric", ["top1", "rel-error", "cosine"])
def test_the_true_loss_is_that_of_all_that_was_not_given(
    folder: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    optimize = onnxlr.optimize

    def watched(*args: Any, data: Path, **options: Any) -> onnxlr.Result:
        with np.load(data) as arrays:
            seen.update(given=arrays["x"], labels=arrays["label"], options=options)
        result = optimize(*args, data=data, **options)
        seen["result"] = result
        return result

    watched.__signature__ = inspect.signature(optimize)  # type: ignore[attr-defined]
    images, labels = np.load(folder / "image.npy"), np.load(folder / "label.npy")
    before = worker.outputs(folder / "net.onnx", images)
    np.testing.assert_allclose(before.argmax(1), labels)
    monkeypatch.setattr(onnxlr, "optimize", watched)
    result = worker.run(task(folder, metric=metric), folder, before)
    monkeypatch.undo()

    given = {image.tobytes() for image in seen["given"]}
    others = [i for i, image in enumerate(images) if image.tobytes() not in given]
    assert (len(given), len(others)) == (200, POPULATION - 200)
    assert [labels[i] for i, x in enumerate(images) if x.tobytes() in given] == [*seen["labels"]]
    expected = loss_one_by_one(
        metric,
        onnx.load(folder / "net.onnx"),
        seen["result"].model,
        images[others],
        labels[others],
    )
    assert expected > 0
    assert result["loss"] == pytest.approx(expected, rel=1e-4)
    assert result["reported"] > 0
    assert result["confidence"] == seen["result"].report.to_dict()["metric"]["confidence"]
    assert result["replaced"] == 1
    assert result["macs"] == pytest.approx((24 * 5 + 5 * 12) / (24 * 12))
    options = seen["options"]
    assert (options["max_drop"], options["metric"], options["rank"]) == (0.5, metric, 5)
    assert "unknown" not in options
    assert options.get("labels") == ("label" if metric == "top1" else None)


def test_other_repeats_give_other_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def stopped(*_: Any, data: Path, **__: Any) -> None:
        with np.load(data) as arrays:
            seen.append(arrays["x"].tobytes())
        raise RuntimeError

    monkeypatch.setattr(onnxlr, "optimize", stopped)
    for repeat in (0, 1, 0):
        with pytest.raises(RuntimeError):
            worker.run(task(folder, repeat=repeat, options={}), folder, np.zeros((POPULATION, 12)))
    assert seen[0] == seen[2] != seen[1]


def test_a_run_that_fails_is_told_and_the_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, rows = folder / "tasks.jsonl", folder / "rows.jsonl"
    wrong = task(folder, key="wrong", model=str(folder / "absent.onnx"))
    tasks.write_text("\n".join(map(json.dumps, (wrong, task(folder)))))
    monkeypatch.setattr(sys, "argv", ["worker.py", str(folder), str(tasks), str(rows)])
    with pytest.raises(SystemExit) as end:
        worker.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("wrong: ")
    assert [row["key"] for row in read_rows(rows)] == ["k"]


def test_a_run_that_was_stopped_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MODELS", folder)
    monkeypatch.setitem(CASES, "mlp", Case("net.onnx", "top1", (0.3, 0.5), POPULATION))
    rows, table = folder / "mine.jsonl", folder / "table.md"
    words = ["--out", str(folder), "--label", "mine", "--given", "100", "--markdown", str(table)]

    def call(*more: str) -> dict[str, dict[str, Any]]:
        done = CliRunner().invoke(main, [*words, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found = {row["key"]: row for row in read_rows(rows)}
        assert len(found) == len(read_rows(rows))
        return found

    first = call("--repeats", "2")
    assert len(first) == 4
    assert {(r["limit"], r["repeat"]) for r in first.values()} == {
        *((limit, repeat) for limit in (0.3, 0.5) for repeat in (0, 1))
    }
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]) + lines[-1][:20])  # its disk was full
    again = call("--repeats", "2", "--jobs", "1")
    assert again.keys() == first.keys()
    kept = [json.loads(line)["key"] for line in lines[:-1]]
    assert all(again[key] == first[key] for key in kept)
    (lost,) = first.keys() - set(kept)
    assert {n: v for n, v in again[lost].items() if n != "seconds"} == {
        n: v for n, v in first[lost].items() if n != "seconds"
    }
    assert call("--repeats", "0") == again
    assert [line.split("|")[1:6] for line in table.read_text().splitlines()[2:]] == [
        [" mine ", " mlp ", " 100 ", f" {limit} ", " 2 "] for limit in (0.3, 0.5)
    ]


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
    assert summarize([row(loss=0.01 + 1e-17)] * 5).broken == 0
    assert summarize([row(loss=0.0101)] * 5).broken == 5
    assert summarize([row(confidence=None)]).stated is None
    assert cells("now", rows)[5] == "15.0% (3.2% to 37.9%)"


def test_versions_stand_below_each_other() -> None:
    rows = [row(given=1000), row(given=300), row(given=300, limit=0.005)]
    table = table_rows({"before": rows[:2], "now": rows})
    assert [(r[2], r[3], r[0]) for r in table] == [
        *(("300", "0.005", "now"), ("300", "0.01", "before"), ("300", "0.01", "now")),
        *(("1,000", "0.01", "before"), ("1,000", "0.01", "now")),
    ]


def test_this_version_runs_from_here_and_another_from_where_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    here = command._environment(sys.executable)["PYTHONPATH"].split(":")
    assert str(Path(onnxlr.__file__).parent.parent) in here
    assert "/elsewhere" not in here
    assert "PYTHONPATH" not in command._environment("/other/python")
