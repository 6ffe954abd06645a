"""The experiments in their quick form: tables and plots are written, and go on where they were."""

import csv
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.support.data_folders import write_batches, write_idx
from tests.support.limits import FEW

torch = pytest.importorskip("torch")

from models.experiments import (  # noqa: E402
    columns,
    convolution,
    deeptwist,
    deeptwist_table,
    distortion_step,
    gaussian,
    tiles,
    truncation,
)
from models.experiments.record import Record, mean_and_spread, read_records  # noqa: E402
from tests.models.training_runs import state  # noqa: E402

EXPERIMENTS: dict[str, tuple[ModuleType, int, set[str]]] = {
    "truncation": (truncation, 2, {"D", "truncated", "retrained"}),
    "convolution": (convolution, 8, {"variant", "accuracy", "airplane", "truck"}),
    "deeptwist": (deeptwist, 2, {"compression", "deeptwist", "decomposed", "gain"}),
    "tiles": (tiles, 2, {"tiles", "rank", "accuracy"}),
    "gaussian": (gaussian, 3, {"relative_error", "near_zero", "kurtosis"}),
    "distortion-step": (distortion_step, 2, {"distortion_step", "accuracy"}),
}


def run(module: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(module.main, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_batches(folder)
    write_idx(folder)
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_quick_run_writes_its_table_and_plot_and_is_not_run_twice(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, count, columns = EXPERIMENTS[name]
    arguments = ["--quick", "--out", tmp_path]
    if name != "gaussian":
        arguments += ["--data-dir", data]
    done = run(module, *arguments)
    assert done.exit_code == 0, done.output
    with (tmp_path / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert columns <= set(rows[0])
    table = (tmp_path / f"{name}.md").read_text()
    assert table in done.output
    assert "torch 2" in table
    assert "minutes in all" in table
    assert "seed" in table
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    records = (tmp_path / f"{name}.jsonl").read_text()
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured twice"))
    again = run(module, *arguments)
    assert again.exit_code == 0, again.output
    assert (tmp_path / f"{name}.md").read_text() == table
    assert (tmp_path / f"{name}.jsonl").read_text() == records


def test_compressions_and_ranks_are_those_of_the_papers(data: Path, tmp_path: Path) -> None:
    run(gaussian, "--quick", "--out", tmp_path)
    rows = [record["row"] for record in read_records(tmp_path / "gaussian.jsonl")]
    for row in rows:
        side = 256 // int(row["tiles"].split("×")[0])
        assert 2 * side * row["rank"] * 4 == side * side
        # A Gaussian matrix at a quarter loses 0.785 to 0.79 of its norm, however it is cut.
        assert row["relative_error"] == pytest.approx(0.787, abs=0.004)
    assert sorted(round(row["kurtosis"], 1) for row in rows) == [3.2, 4.8, 6.2]

    run(tiles, "--quick", "--out", tmp_path / "tiles", "--data-dir", data)
    for record in read_records(tmp_path / "tiles" / "tiles.jsonl"):
        row = record["row"]
        # Nine convolutions of a resnet32; five of a resnet20.
        assert row["layers"] == 5
        assert 2 * row["rank"] * row["compression"] == row["side"]


@pytest.mark.parametrize("column", [c for c in columns.COLUMNS if c != "deeptwist"])
def test_one_column_is_trained_recorded_and_tabulated(
    column: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxlr.api.functions.LIMITS", replace(FEW, ranks=2, refined_sets=1))
    arguments = ("--quick", "--out", tmp_path, "--data-dir", data, "--column", column)
    done = run(deeptwist, *arguments)
    assert done.exit_code == 0, done.output
    records = read_records(tmp_path / "deeptwist.jsonl")
    assert [record["row"]["share"] for record in records] == [0.5]
    for record in records:
        row = record["row"]
        assert row["column"] == column
        assert (row["epochs"], row["steps"], row["layers"]) == (1, 1, 18)
        assert row["schedule"] == "half-cosine"
        assert 0 <= row["truncated"] <= 1
        assert row["seconds"] > 0
        assert record["settings"]["precision"] == "float32"
    (checkpoint,) = (tmp_path / "runs").iterdir()
    ended = state(checkpoint)
    twist = ended["twist"] or {}
    assert bool(twist) == (column in ("data-metric", "twist-then-factors"))
    assert bool(twist.get("inputs")) == (column == "data-metric")
    assert ended["factorized"] == (column == "twist-then-factors")
    table = run(deeptwist_table, "--out", tmp_path)
    assert table.exit_code == 0
    head, _, *lines = table.output.splitlines()
    assert head.startswith("| compression | trained | steps |")
    rows = {row["compression"]: row for row in (record["row"] for record in records)}
    wanted = [(f"{c:.2f}", column, f"{rows[c]['accuracy']:.2%}") for c in sorted(rows)]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [(c[1], c[2], c[8]) for c in cells] == wanted


def test_a_table_has_a_row_for_each_way_and_schedule(tmp_path: Path) -> None:
    def record(seed: int, accuracy: float, lr: float = 0.1, **changes: Any) -> dict[str, Any]:
        row = {
            "column": "deeptwist",
            "compression": 2.761,
            "steps": 1000,
            "schedule": "steps",
            "every": 200,
            "distortions": 6,
            "truncated": 0.25,
            "seconds": 120.0,
        }
        settings = {"lr": lr, "batch_size": 128}
        changed = row | {"seed": seed, "accuracy": accuracy} | changes
        return {"key": f"{seed}", "settings": settings, "row": changed}

    records = [
        record(1, 0.90),
        record(0, 0.80, every=None, column="decomposed"),
        record(0, 0.88, seconds=60.0),
        record(0, 0.70, lr=0.2),
    ]
    assert deeptwist_table.lines(records)[2:] == [
        "| 2.76 | decomposed | 1,000 of 128 images | 0.1, steps |  |  | 25.00% | 80.00% |  "
        "| 0: 80.00% | 2.0 |",
        "| 2.76 | deeptwist | 1,000 of 128 images | 0.1, steps | 200 | 6 | 25.00% | 89.00% | 1.41 "
        "| 0: 88.00%, 1: 90.00% | 1.5 |",
        "| 2.76 | deeptwist | 1,000 of 128 images | 0.2, steps | 200 | 6 | 25.00% | 70.00% |  "
        "| 0: 70.00% | 2.0 |",
    ]
    done = run(deeptwist_table, "--out", tmp_path)
    assert done.exit_code == 1
    assert "deeptwist.jsonl has no runs; name the --out" in done.output


def test_rows_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    def row(settings: dict[str, Any]) -> Any:
        return Record("name", tmp_path, settings).row("key", lambda: {"value": 1})

    assert row({"seed": 0, "lr": 0.1}) == row({"seed": 0, "lr": 0.1})
    with pytest.raises(Exception, match=r"measured with lr 0\.1 \(now 0\.2\)"):
        row({"seed": 0, "lr": 0.2})
    with (tmp_path / "name.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(Exception, match=r"line 2, can't be read as a row \(JSONDecodeError\)"):
        row({"seed": 0, "lr": 0.1})


def test_a_network_that_has_no_such_layer_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    arguments = ("--data-dir", data, "--network", "mlp", "--base-epochs", 1, "--out", tmp_path)
    done = run(deeptwist, *arguments)
    assert done.exit_code == 2
    assert "Error: no layer of the model can be distorted" in done.output


def test_mean_and_spread() -> None:
    assert mean_and_spread([3.0]) == (3.0, 0.0)
    mean, spread = mean_and_spread([1.0, 2.0, 4.0])
    assert mean == pytest.approx(np.mean([1, 2, 4]))
    assert spread == pytest.approx(np.std([1, 2, 4], ddof=1))
