"""Whole runs whose limit is tested: the parts of the data, the ladder, and what is said."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from rich.console import Console

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.cli.tables import show_report
from onnxlr.courses import course
from onnxlr.jobs import pipeline
from onnxlr.plan.ladder import Ladder, with_others
from onnxlr.plan.plan import Plan
from onnxlr.prepare.feeding import Feeding, open_with_feeding
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Silent
from onnxlr.system.session import Session
from tests.support.builders import make_model, node
from tests.support.limits import SHORT, short_runs

CLASSES, WIDTH = 8, 48
COUNTED: dict[str, Any] = {"measure": False, "target": "macs"}
LADDERS = replace(SHORT, rungs=7, corrected_rungs=2)  # as long as they usually are
QUICK = COUNTED | {"labels": "label"}


@pytest.fixture(autouse=True)
def usual_ladders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.api.functions.LIMITS", LADDERS)


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs around one centre a class, and their classes, of which some are out of reach."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, WIDTH))
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, count)
    x = centres[label] + 1.3 * rng.standard_normal((count, WIDTH))
    return x.astype(np.float32), label


def classifier() -> onnx.ModelProto:
    """Two layers of falling spectra, and a linear layer that was fitted to the classes."""
    rng = np.random.default_rng(1)

    def weight(n: int, m: int) -> np.ndarray:
        u, v = (np.linalg.qr(rng.standard_normal((k, min(n, m))))[0] for k in (n, m))
        falling = (1 + np.arange(min(n, m))) ** -1.5
        return np.asarray((u * falling) @ v.T * np.sqrt(n), dtype=np.float32)

    w0, w1 = weight(WIDTH, 96), weight(96, 96)
    x, label = clusters(4000, 2)
    features = np.maximum(np.maximum(x @ w0, 0) @ w1, 0)
    w2 = np.linalg.lstsq(features, np.eye(CLASSES)[label], rcond=None)[0].astype(np.float32)
    return make_model(
        [
            node("MatMul", ["x", "w0"], "h0"),
            node("Relu", ["h0"], "r0"),
            node("MatMul", ["r0", "w1"], "h1"),
            node("Relu", ["h1"], "r1"),
            node("MatMul", ["r1", "w2"], "y"),
        ],
        {"x": ("n", WIDTH)},
        ["y"],
        {"w0": w0, "w1": w1, "w2": w2},
    )


def write_samples(path: Path, count: int, seed: int = 3) -> Path:
    x, label = clusters(count, seed)
    np.savez(path, x=x, label=label)
    return path


@dataclass(frozen=True)
class Case:
    """A model and its samples in files, and a run with them.

    Attributes
    ----------
    model, data, cache : Path
    result : Result
    ladder : Ladder
    frontier : Path
        Folder of the plans of all models that were judged.
    """

    model: Path
    data: Path
    cache: Path
    result: onnxlr.Result
    ladder: Ladder
    frontier: Path


@contextmanager
def watched_ladders() -> Iterator[list[Ladder]]:
    """The ladders of the runs within."""
    ladders: list[Ladder] = []
    with pytest.MonkeyPatch.context() as patch:

        def watched(*arguments: Any) -> Ladder:
            ladders.append(with_others(*arguments))
            return ladders[-1]

        patch.setattr(course, "with_others", watched)
        yield ladders


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("promise")
    model, data = folder / "net.onnx", folder / "d.npz"
    onnx.save(classifier(), model)
    write_samples(data, 1600)
    with short_runs(folder / "cache") as patch, watched_ladders() as ladders:
        patch.setattr("onnxlr.api.functions.LIMITS", LADDERS)
        result = onnxlr.optimize(
            *(model, folder / "o.onnx"),
            data=data,
            max_drop=0.03,
            frontier=folder / "points",
            report=folder / "r.html",
            json=folder / "r.json",
            **QUICK,
        )
    return Case(model, data, folder / "cache", result, ladders[0], folder / "points")


@pytest.fixture
def again(case: Case) -> Case:
    """The same case, with a cache that knows what its run computed."""
    shutil.copytree(case.cache, os.environ["ONNXLR_CACHE"])
    return case


def choices(ladder: Ladder) -> list[tuple[dict[str, Any], int]]:
    return [(dict(r.variant.choices), r.variant.sequential) for r in ladder.rungs]


def test_the_parts_have_no_sample_in_common(case: Case) -> None:
    parts = case.result.report.parts
    assert {p.name: p.samples for p in parts} == {"fit": 533, "choose": 267, "test": 800}
    assert case.result.plan.calibration is not None
    assert case.result.plan.calibration.share == (1, 3)


def test_the_loss_is_shown_and_said(case: Case) -> None:
    report = case.result.report
    assert len(report.replaced) > 0
    assert report.claim == "800 samples: loss within 3.0 pp at 95% confidence"
    metric = report.to_dict()["metric"]
    low, high = metric["interval"]
    assert low < metric["loss"] < high <= 0.03
    assert metric["confidence"] == 0.95
    assert metric["samples"] == 800
    assert metric["loss"] == pytest.approx(metric["original"] - metric["optimized"])
    page = (case.frontier.parent / "r.html").read_text()
    assert report.claim in page
    assert "What more or less loss would buy" in page
    written = json.loads((case.frontier.parent / "r.json").read_text())
    assert written["frontier"] == report.to_dict()["frontier"]
    assert written["parts"]["test"]["samples"] == 800


def test_the_last_that_holds_is_handed_over_and_the_next_does_not(case: Case) -> None:
    rungs = [dict(r.variant.choices) for r in case.ladder.rungs]
    assert len(rungs) > 2
    saved = [sum(c.saved for c in r.chosen.values()) for r in case.ladder.rungs]
    assert saved == sorted(saved)  # from mild to bold
    chosen = case.result.plan.choices()
    at = rungs.index(chosen)
    notes = " ".join(case.result.report.notes)
    if at + 1 < len(rungs):
        assert "samples would be needed to show that it is within 3.0 pp" in notes or (
            "on the test samples, which isn't below the limit of 3.0 pp" in notes
        )
        (failed,) = [p for p in case.result.report.frontier if p.refused]
        assert failed.plan.choices() == rungs[at + 1]
        assert failed.refused.endswith(" on the test samples")
        console = Console(width=200, record=True, file=io.StringIO())
        show_report(console, case.result.report)
        assert failed.refused in console.export_text()


def test_every_point_of_the_frontier_can_be_made(case: Case, tmp_path: Path) -> None:
    points = case.result.report.frontier
    assert sum(p.chosen for p in points) == 1
    assert {p.file_name for p in points} == {p.name for p in case.frontier.iterdir()}
    assert [p.loss for p in points] == sorted(p.loss for p in points)
    for point in points:
        plan = Plan.from_json((case.frontier / point.file_name).read_text())
        onnxlr.apply(plan, case.model, tmp_path / "p.onnx")
        assert (tmp_path / "p.onnx").stat().st_size == point.bytes
        assert len(plan.replaced) == point.layers
    chosen = next(p for p in points if p.chosen)
    onnxlr.apply(case.frontier / chosen.file_name, case.model, tmp_path / "again.onnx")
    handed_over = case.frontier.parent / "o.onnx"
    assert (tmp_path / "again.onnx").read_bytes() == handed_over.read_bytes()


class Poison:
    """Test samples that are anything but the ones there were: all zeros, and wrong labels."""

    def __init__(self, feeding: Feeding) -> None:
        assert feeding.test is not None
        part = feeding.test
        assert part.labels is not None
        parts = tuple({n: np.zeros_like(a) for n, a in p.items()} for p in part.parts)
        labels = np.asarray((part.labels + 3) % CLASSES)
        self.part = Samples(part.label, parts, labels, part.index, part.specs)


def test_nothing_that_chooses_looks_at_the_test_part(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in the test part, the ladder is the same to the byte."""
    unpatched = open_with_feeding

    def poisoned(*arguments: Any, **named: Any) -> tuple[Session, Feeding]:
        session, feeding = unpatched(*arguments, **named)
        return session, Feeding(
            *(feeding.first_feed, feeding.choose, feeding.fit, Poison(feeding).part, feeding.share)
        )

    monkeypatch.setattr(pipeline, "open_with_feeding", poisoned)
    with short_runs(tmp_path / "cache") as patch, watched_ladders() as ladders:
        patch.setattr("onnxlr.api.functions.LIMITS", LADDERS)
        result = onnxlr.optimize(case.model, data=case.data, max_drop=0.03, **QUICK)
    assert choices(ladders[0]) == choices(case.ladder)
    for mine, theirs in zip(ladders[0].rungs, case.ladder.rungs, strict=True):
        assert mine.variant.factors.keys() == theirs.variant.factors.keys()
        for name, factored in mine.variant.factors.items():
            for a, b in zip(factored.factors, theirs.variant.factors[name].factors, strict=True):
                assert a.tobytes() == b.tobytes()
        assert mine.quality == theirs.quality
    assert result.report.quality != case.result.report.quality  # the poison was tasted in the end


def test_another_file_tests_where_one_is_named(case: Case, tmp_path: Path) -> None:
    """The labels of the file are all wrong for the original, too: nobody chose by them."""
    validation = write_samples(tmp_path / "v.npz", 500, seed=9)
    with watched_ladders() as ladders:
        result = onnxlr.optimize(
            case.model, data=case.data, validation=validation, max_drop=0.03, **QUICK
        )
    assert {p.name: p.samples for p in result.report.parts} == {
        "fit": 1066,
        "choose": 534,
        "test": 500,
    }
    assert ladders[0].rungs
    assert result.report.claim.startswith("500 samples")


@pytest.mark.parametrize(
    ("count", "claim"),
    [
        (150, "75 samples: loss within 1.0 pp at 53% confidence; 300 would do for 95%"),
        (400, "200 samples: loss within 1.0 pp at 87% confidence; 300 would do for 95%"),
    ],
)
def test_few_samples_show_what_they_can(case: Case, tmp_path: Path, count: int, claim: str) -> None:
    data = write_samples(tmp_path / "few.npz", count)
    result = onnxlr.optimize(case.model, data=data, **QUICK)
    assert result.report.claim == claim
    assert len(result.report.replaced) > 0
    assert any("600 in --data, of which half test" in note for note in result.report.notes)
    metric = result.report.to_dict()["metric"]
    assert metric["confidence"] < 0.95


def test_a_named_confidence_is_never_lowered(case: Case, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "few.npz", 150)
    result = onnxlr.optimize(case.model, data=data, confidence=0.95, **QUICK)
    assert result.report.verdict.startswith("no gain")
    assert "75 samples can show losses down to 3.9 pp at 95% confidence" in result.report.claim
    reasons = [d.reason for d in result.report.decisions]
    assert any("doesn't show at 95% confidence that it is within 1.0 pp" in r for r in reasons)


def test_half_a_confidence_compares_two_numbers(again: Case) -> None:
    bold = onnxlr.optimize(again.model, data=again.data, max_drop=0.03, confidence=0.5, **QUICK)
    assert "at 50% confidence" in bold.report.claim
    assert bold.report.output.params <= again.result.report.output.params
    strict = onnxlr.optimize(again.model, data=again.data, max_drop=0.03, confidence=0.999, **QUICK)
    assert strict.report.output.params >= again.result.report.output.params


def test_named_ranks_are_tested_too(again: Case) -> None:
    """Rank 3 loses far more than a point; what of it can't be shown is put back."""
    result = onnxlr.optimize(again.model, data=again.data, rank=3, max_drop=0.01, **QUICK)
    quality = result.report.quality
    assert quality is not None
    assert quality.drop <= 0.01
    assert len(result.report.replaced) < 2
    assert any("put back" in d.reason for d in result.report.decisions)


def test_a_fraction_that_is_not_shown_is_exit_code_3(again: Case, tmp_path: Path) -> None:
    words = ["optimize", str(again.model), str(tmp_path / "o.onnx"), "--data", str(again.data)]
    words += ["--labels", "label", "--target", "macs=0.15", "--max-drop", "0.002", "--no-measure"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 3, done.output
    assert "budget" in done.output or "accuracy" in done.output
    assert not (tmp_path / "o.onnx").exists()


METRIC = """
import numpy as np
D = np.load({data!r})
def both(session):
    y = session.run(None, {{"x": D["x"]}})[0]
    return {give}
"""


@pytest.mark.parametrize(
    ("give", "tested"),
    [
        ("(y.argmax(1) == D['label'])", True),
        ("1 / (1 + np.abs(y[:, 0] - D['x'][:, 0]))", True),
        ("float((y.argmax(1) == D['label']).mean())", False),
    ],
)
def test_a_metric_of_the_user_s(
    again: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, give: str, tested: bool
) -> None:
    name = f"metric_{abs(hash(give))}"
    (tmp_path / f"{name}.py").write_text(METRIC.format(data=str(again.data), give=give))
    monkeypatch.chdir(tmp_path)
    result = onnxlr.optimize(
        again.model, data=again.data, metric=f"{name}:both", max_drop=0.03, **COUNTED
    )
    metric = result.report.to_dict()["metric"]
    assert metric["tested"] == tested
    if tested:
        assert metric["samples"] == 800
        assert metric["interval"][1] <= 0.03
        assert result.report.claim.startswith("800 samples: loss within 0.03 at 95% confidence")
    else:
        assert result.report.claim.startswith("not tested")
        assert metric["interval"] is None
    assert len(result.report.replaced) > 0


def test_few_samples_of_a_graded_metric_are_compared_at_last(
    again: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they could show of most models, they show of none of these: then means decide."""
    give = "(1 / (1 + np.abs(y[:, 0] - D['x'][:, 0])))[:60]"
    (tmp_path / "graded.py").write_text(METRIC.format(data=str(again.data), give=give))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "onnxlr.verify.promise.highest_confidence", lambda _, n, __: 0.949 if n < 40 else 0.99
    )
    arguments = {"data": again.data, "metric": "graded:both", "max_drop": 0.002, **COUNTED}
    arguments["without"] = ["sequential", "widths"]
    result = onnxlr.optimize(again.model, **arguments)
    metric = result.report.to_dict()["metric"]
    assert result.report.claim.startswith(
        "30 samples: loss within 0.002 at 50% confidence, which is no more than comparing two"
    )
    assert metric["confidence"] == 0.5
    assert metric["loss"] <= 0.002
    low, high = metric["interval"]  # at 95%: at a half both ends would be the loss
    assert low < metric["loss"] < high
    assert len(result.report.replaced) > 0
    named = onnxlr.optimize(again.model, confidence=0.949, **arguments)
    assert not named.report.replaced


def test_without_samples_nothing_is_tested(case: Case) -> None:
    result = onnxlr.optimize(case.model, measure=False)
    assert result.report.claim.startswith("not tested: there are no samples")
    assert result.report.to_dict()["metric"]["tested"] is False
    with pytest.raises(onnxlr.UsageError, match=r"--confidence 0\.9 needs samples"):
        onnxlr.optimize(case.model, confidence=0.9)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, float("nan")])
def test_a_confidence_that_is_none(case: Case, confidence: float) -> None:
    with pytest.raises(onnxlr.UsageError, match="give a number between 0 and 1"):
        onnxlr.optimize(case.model, data=case.data, confidence=confidence)


def test_a_frontier_goes_into_a_new_folder(case: Case, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(onnxlr.UsageError, match="isn't empty"):
        onnxlr.optimize(case.model, data=case.data, frontier=tmp_path / "full", **QUICK)
    with pytest.raises(onnxlr.OutputError, match="missing"):
        onnxlr.optimize(case.model, data=case.data, frontier=tmp_path / "missing" / "p", **QUICK)
    with pytest.raises(onnxlr.DataError):
        onnxlr.optimize(case.model, data=tmp_path / "none.npz", frontier=tmp_path / "new", **QUICK)
    assert not (tmp_path / "new").exists()


def test_a_time_limit_leaves_out_what_could_go_on(again: Case) -> None:
    result = onnxlr.optimize(again.model, data=again.data, time_limit=1e-3, max_drop=0.03, **QUICK)
    (note,) = (n for n in result.report.notes if n.startswith("--time-limit 0.001"))
    assert "further trials" in note
    assert result.report.claim.startswith("800 samples")
    unlimited = onnxlr.optimize(
        again.model, data=again.data, time_limit=1e6, max_drop=0.03, **QUICK
    )
    assert unlimited.plan == again.result.plan
    assert not any("--time-limit" in note for note in unlimited.report.notes)
    with pytest.raises(onnxlr.UsageError, match="--time-limit 0 is out of range"):
        onnxlr.optimize(again.model, time_limit=0)


def test_long_work_is_announced(again: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    class Listener(Silent):
        def tell(self, line: str) -> None:
            lines.append(line)

    monkeypatch.setattr("onnxlr.plan.estimate._TOLD_FROM", 0.0)
    onnxlr.optimize(again.model, data=again.data, max_drop=0.03, progress=Listener(), **QUICK)
    assert "800 samples can show losses down to 0.4 pp at 95% confidence" in lines
    assert lines[-1].startswith("this takes about ")
