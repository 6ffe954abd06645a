"""Comparisons with limits: what breaks one is said, written down, and the command's exit code."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.jobs.comparison import Bounds, ModelComparison
from tests.support.builders import make_model, node

CLASSES = 10


def network(noise: float, layers: int = 0) -> onnx.ModelProto:
    """A classifier whose weight is moved by noise, behind layers that take time and do nothing."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, CLASSES)) + noise * rng.standard_normal((32, CLASSES))
    weights = {"w": weight.astype(np.float32), "one": np.eye(32, dtype=np.float32)}
    nodes, value = [], "x"
    for i in range(layers):
        nodes.append(node("MatMul", [value, "one"], f"h{i}"))
        value = f"h{i}"
    return make_model(
        [*nodes, node("MatMul", [value, "w"], "y", "fc")],
        {"x": ("n", 32)},
        ["y"],
        weights if layers else {"w": weights["w"]},
    )


@pytest.fixture
def files(here: Path) -> Path:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((800, 32)).astype(np.float32)
    for name, model in (("a", network(0)), ("b", network(0.3)), ("slow", network(0, 300))):
        onnx.save(model, here / f"{name}.onnx")
    np.savez(here / "s.npz", x=x)
    return here


def run(*words: str, code: int) -> str:
    result = CliRunner().invoke(main, ["compare", *words, "--metric", "agreement"])
    assert result.exit_code == code, result.output
    return result.output


def test_a_model_that_loses_more_than_allowed_ends_with_3_and_is_written_down(files: Path) -> None:
    pages = "--markdown", "c.md", "--json", "c.json"
    output = run("a.onnx", "b.onnx", "--data", "s.npz", "--max-drop", "0.01", *pages, code=3)
    content = json.loads((files / "c.json").read_text())
    loss = content["metric"]["loss"]
    assert loss > 0.02
    words = f"agreement lost {100 * loss:.1f} pp: more than the 1.0 pp of --max-drop"
    assert f"onnxlr: {words}" in output
    limits = {"max_drop": 0.01, "max_slowdown": None, "violations": [words]}
    assert content["limits"] == limits
    page = (files / "c.md").read_text()
    assert f"**Outside the limits:** {words}." in page
    assert f"| {content['metric']['optimized']:.4f} |" in page
    assert f"| bytes | {(files / 'a.onnx').stat().st_size:,} |" in page


def test_within_the_limits_it_ends_with_0(files: Path) -> None:
    allowed = "--max-drop", "0.5", "--max-slowdown", "100"
    run("a.onnx", "b.onnx", "--data", "s.npz", *allowed, "--markdown", "c.md", code=0)
    assert "**Within the limits.**" in (files / "c.md").read_text()
    run("a.onnx", "b.onnx", "--data", "s.npz", "--max-drop", "1", code=0)  # no limit
    run("a.onnx", "a.onnx", "--data", "s.npz", "--max-drop", "0", code=0)
    run("a.onnx", "b.onnx", "--data", "s.npz", "--markdown", "d.md", code=0)
    assert "limits" not in (files / "d.md").read_text()


@pytest.mark.usefixtures("files")
def test_a_model_that_takes_many_times_as_long_is_slower() -> None:
    output = run("a.onnx", "slow.onnx", "--data", "s.npz", "--max-slowdown", "0.5", code=3)
    assert "more than the 50.0% of --max-slowdown" in output
    run("slow.onnx", "a.onnx", "--data", "s.npz", "--max-slowdown", "0", code=0)


def compared(files: Path, **bounds: Any) -> ModelComparison:
    return onnxlr.compare(
        files / "a.onnx", files / "b.onnx", data=files / "s.npz", metric="agreement", **bounds
    )


@pytest.mark.parametrize(
    ("low", "high", "allowed", "broken"),
    [
        (0.90, 0.94, 0.05, True),  # at the fast end of its interval it is 6.4% slower
        (0.90, 0.96, 0.05, False),  # there it is 4.2% slower: that may be all
        (0.90, 0.99, 0.0, True),
        (0.90, 1.01, 0.0, False),
    ],
)
def test_a_slow_down_counts_at_the_fast_end_of_its_interval(
    files: Path, low: float, high: float, allowed: float, broken: bool
) -> None:
    result = compared(files)
    speed = replace(result.speed, speedup=(low + high) / 2, low=low, high=high)
    found = replace(result, speed=speed, bounds=Bounds(None, allowed)).violations
    assert bool(found) == broken


def test_in_python_the_result_names_what_is_broken_and_raises_nothing(files: Path) -> None:
    result = compared(files, max_drop=0.01, markdown=files / "p.md")
    assert len(result.violations) == 1
    assert result.violations[0] in (files / "p.md").read_text()
    assert compared(files, max_drop=0.5).violations == ()
    loss = result.quality.drop
    assert replace(result, bounds=Bounds(loss)).violations == ()  # just as much is within
    assert replace(result, bounds=Bounds(0.99 * loss)).violations


def test_names_mean_nothing_to_markdown(files: Path) -> None:
    (files / "a.onnx").rename(files / "a_|_*b*.onnx")
    run("a_|_*b*.onnx", "b.onnx", "--markdown", "c.md", code=0)
    assert r"a\_\|\_\*b\*.onnx" in (files / "c.md").read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--max-slowdown", "-0.1"), 2, "--max-slowdown -0.1 isn't a share of the time"),
        (("--max-slowdown", "nan"), 2, "isn't a share of the time"),
        (("--max-drop", "-1"), 2, "--max-drop -1.0 is not a loss"),
        (("--markdown", "-"), 2, "- prints, which only --json does"),
        (("--markdown", "a.onnx"), 2, "a.onnx"),
        (("--markdown", "nowhere/c.md"), 1, "nowhere"),
        (("--markdown", "c.md", "--json", "c.md"), 2, "named for two outputs"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    files: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    before = (files / "a.onnx").read_bytes()
    output = run("a.onnx", "b.onnx", *words, code=code)
    assert said in output
    assert "Traceback" not in output
    assert (files / "a.onnx").read_bytes() == before
