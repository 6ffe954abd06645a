"""The experiments in their quick form: tables and plots are written, and go on where they were."""

import csv
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.support.data_folders import write_batches, write_idx

torch = pytest.importorskip("torch")

from models.experiments import (  # noqa: E402
    convolution,
    deeptwist,
    distortion_step,
    gaussian,
    tiles,
    truncation,
)
from models.experiments.record import Record, mean_and_spread  # noqa: E402

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

    files = {p.name for p in (tmp_path / f"{name}-rows").iterdir()}
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured twice"))
    again = run(module, *arguments)
    assert again.exit_code == 0, again.output
    assert (tmp_path / f"{name}.md").read_text() == table
    assert {p.name for p in (tmp_path / f"{name}-rows").iterdir()} == files


def test_compressions_and_ranks_are_those_of_the_papers(data: Path, tmp_path: Path) -> None:
    run(gaussian, "--quick", "--out", tmp_path)
    rows = [json.loads(p.read_text())["row"] for p in (tmp_path / "gaussian-rows").iterdir()]
    for row in rows:
        side = 256 // int(row["tiles"].split("×")[0])
        assert 2 * side * row["rank"] * 4 == side * side
        # A Gaussian matrix at a quarter loses 0.785 to 0.79 of its norm, however it is cut.
        assert row["relative_error"] == pytest.approx(0.787, abs=0.004)
    assert sorted(round(row["kurtosis"], 1) for row in rows) == [3.2, 4.8, 6.2]

    run(tiles, "--quick", "--out", tmp_path / "tiles", "--data-dir", data)
    for path in (tmp_path / "tiles" / "tiles-rows").iterdir():
        row = json.loads(path.read_text())["row"]
        # Nine convolutions of a resnet32; five of a resnet20.
        assert row["layers"] == 5
        assert 2 * row["rank"] * row["compression"] == row["side"]


def test_rows_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    def row(settings: dict[str, Any]) -> Any:
        return Record("name", tmp_path, settings).row("key", lambda: {"value": 1})

    assert row({"seed": 0, "lr": 0.1}) == row({"seed": 0, "lr": 0.1})
    with pytest.raises(Exception, match=r"measured with lr 0\.1 \(now 0\.2\)"):
        row({"seed": 0, "lr": 0.2})
    (tmp_path / "name-rows" / "key.json").write_text("{")
    with pytest.raises(Exception, match=r"can't be read as a row \(JSONDecodeError\)"):
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
