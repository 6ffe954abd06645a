"""What the command and the functions say of the metric that was chosen, and hold to."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.cli.commands import main
from tests.support.builders import low_rank, make_model, node

RNG = np.random.default_rng(0)
WHY = "the output is an embedding of 32 numbers a sample (all of the same length)"


def run(*command: str) -> tuple[str, str]:
    result = CliRunner().invoke(main, list(command), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split()), " ".join(result.stderr.split())


@pytest.fixture
def embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that ends in an L2 normalization, with samples that have labels too."""
    monkeypatch.chdir(tmp_path)
    nodes = [
        node("MatMul", ["x", "w"], "h", "fc"),
        node("ReduceL2", ["h"], "norm", axes=[1], keepdims=1),
        node("Div", ["h", "norm"], "y"),
    ]
    noise = 0.01 * RNG.standard_normal((64, 32))
    weight = (low_rank(RNG, 64, 32, 3) + noise).astype(np.float32)
    onnx.save(make_model(nodes, {"x": ("n", 64)}, ["y"], {"w": weight}), tmp_path / "net.onnx")
    x = RNG.standard_normal((120, 64)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, topic=np.arange(120) % 4)
    return tmp_path / "net.onnx"


def test_an_embedding_is_judged_by_cosine_and_that_is_said(embedding: Path) -> None:
    out, err = run(
        *("optimize", embedding.name, "o.onnx", "--data", "d.npz", "--rank", "3"),
        *("--no-measure", "--json", "r.json", "--report", "r.html"),
    )
    line = f"metric: cosine, limit 0.02: {WHY}; --metric and --max-drop name others"
    assert line in out
    assert err == ""  # where it is a terminal, the line is said before the work too
    assert "Metric: cosine, limit 0.02: the output is an embedding" in Path("r.html").read_text()
    row = json.loads(Path("r.json").read_text())["metric"]
    assert (row["name"], row["limit"], row["chosen_because"]) == ("cosine", 0.02, WHY)


def test_what_is_named_is_not_explained(embedding: Path) -> None:
    result = onnxlr.optimize(embedding, data="d.npz", metric="cosine", rank=3, measure=False)
    metric = result.report.to_dict()["metric"]
    assert (metric["limit"], metric["chosen_because"]) == (0.02, "named with --metric")
    assert result.report.choice == ""
    result = onnxlr.optimize(embedding, data="d.npz", max_drop=0.3, rank=3, measure=False)
    assert result.report.to_dict()["metric"]["limit"] == 0.3
    assert result.report.choice == f"metric: cosine, limit 0.3: {WHY}; --metric names another"


def test_comparing_says_it_too(embedding: Path) -> None:
    name = embedding.name
    out, _ = run("compare", name, name, "--data", "d.npz", "--labels", "topic")
    unused = "the labels aren't used: its arg-max has nothing to do with them"
    assert f"metric: cosine: {WHY}; {unused}; --metric names another" in out
    row = json.loads(run("compare", name, name, "--data", "d.npz", "--json", "-")[0])
    assert row["metric"]["chosen_because"] == WHY


def test_labels_of_the_validation_samples_alone(embedding: Path) -> None:
    with np.load("d.npz") as samples:
        np.savez("fit.npz", x=samples["x"])
    options = {"validation": "d.npz", "labels": "topic", "rank": 3, "measure": False}
    result = onnxlr.optimize(embedding, data="fit.npz", **options)  # type: ignore[arg-type]
    assert result.report.to_dict()["metric"]["name"] == "cosine"
    assert f"{WHY}; the labels aren't used" in result.report.choice
