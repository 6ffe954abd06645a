"""The command's face: tables of any name, JSON, help, passes, and a stop that cleans up."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxlr.cli.commands import main
from tests.support import commands
from tests.support.builders import linear, low_rank, make_model, node

RNG = np.random.default_rng(0)


def run(*command: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(command), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose names would mean something to a terminal library."""
    monkeypatch.chdir(tmp_path)
    nodes = [
        node("MatMul", ["x", "w[red]"], "h", "fc[/b]:smile:"),
        node("MatMul", ["h", "v"], "y", "größe/層"),
    ]
    weights = {"w[red]": low_rank(RNG, 64, 48, 3), "v": low_rank(RNG, 48, 32, 2)}
    path = tmp_path / "net[v2].onnx"
    onnx.save(make_model(nodes, {"x": ("n", 64)}, ["y"], weights), path)
    return path


def test_every_command_shows_names_as_they_are(model: Path) -> None:
    out = "out[b]v2.onnx"
    text = run("optimize", model.name, out, "--rank", "exact", "--plan-out", "plan.json")
    assert "fc[/b]:smile:" in text
    assert "größe/層" in text
    assert "2 of 2 layers replaced" in text
    assert "fc[/b]:smile:" in run("inspect", model.name)
    assert out in run("bench", model.name, out, "--seconds", "0.05")
    assert "agreement" in run("compare", model.name, out)
    assert "net[v2].onnx: wrote again.onnx" in run("apply", "plan.json", model.name, "again.onnx")
    assert Path("again.onnx").read_bytes() == Path(out).read_bytes()


@pytest.mark.parametrize("end", [SystemExit(0), GeneratorExit("enough")])
def test_a_method_does_not_end_the_command(
    end: BaseException, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that a method calls may exit as scripts do; nothing was written: that is a failure."""

    def leave(self: object, *_: object) -> None:  # noqa: ARG001 - it says whose method this is
        raise end

    monkeypatch.setattr("onnxlr_passes.svd.Svd.factorize", leave)
    command = ["optimize", model.name, "o.onnx", "--rank", "3", "--verify", "none"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert f"internal error in the method 'svd' of onnxlr ({type(end).__name__}" in done.stderr
    assert not Path("o.onnx").exists()


def test_what_a_method_gives_is_its_affair(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr_passes.svd.Svd.compose", lambda *_: None)
    command = ["optimize", model.name, "o.onnx", "--rank", "3", "--verify", "none"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "internal error in the method 'svd' of onnxlr (" in done.stderr
    assert not Path("o.onnx").exists()


def test_json_on_standard_output_is_json_alone(model: Path) -> None:
    report = json.loads(run("optimize", model.name, "o.onnx", "--rank", "exact", "--json", "-"))
    assert [layer["rank"] for layer in report["layers"]] == [3, 2]
    rows = json.loads(run("inspect", model.name, "--json", "-"))["layers"]
    assert [row["methods"][0]["full_rank"] for row in rows] == [48, 32]
    assert [row["methods"][0]["break_even"] for row in rows] == [27, 19]
    assert len(rows[0]["methods"][0]["spectra"][0]) == 48
    assert json.loads(run("bench", model.name, "--seconds", "0.05", "--json", "-"))["batch"] == 1
    pair = json.loads(run("compare", model.name, "o.onnx", "--json", "-"))
    assert pair["fidelity"]["rel_error"] < 1e-5
    assert pair["speed"]["theoretical_speedup"] > 1


def test_quiet_says_nothing(model: Path) -> None:
    assert run("optimize", model.name, "o.onnx", "--rank", "exact", "--quiet") == ""
    assert run("inspect", model.name, "--quiet") == ""


def test_a_name_that_is_empty(model: Path) -> None:
    """A shell passes an empty name where a variable isn't set."""
    for names in (["", model.name], [""], [model.name, ""]):
        done = CliRunner().invoke(main, ["bench", *names, "--seconds", "0.05"])
        assert done.exit_code == 1
        assert "is a folder" in done.stderr


def test_methods_by_repetition_and_by_commas(model: Path) -> None:
    for flags in (["--method", "svd", "--method", "channel-svd"], ["--method", "svd,channel-svd"]):
        run("optimize", model.name, "o.onnx", "--rank", "exact", "--max-drop", "1", *flags)
        assert len(onnx.load("o.onnx").graph.node) == 4


def test_passes_are_listed_with_where_they_come_from() -> None:
    text = run("passes")
    for name in ("svd", "channel-svd", "input-channel-svd"):
        assert name in text
    assert "onnxlr" in text


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_from_outside_leaves_nothing_behind(
    stop: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(linear(low_rank(RNG, 64, 48, 3), rows="n", name="fc"), tmp_path / "in.onnx")
    (tmp_path / "slow_metric.py").write_text(
        "import pathlib, time\n"
        "def f(session):\n"
        "    pathlib.Path('asked').touch()\n"
        "    time.sleep(60)\n"
    )
    options = ["optimize", "in.onnx", "out.onnx", "--rank", "3", "--metric", "slow_metric:f"]
    monkeypatch.chdir(tmp_path)
    with commands.start(*options, entry=commands.UNWATCHED) as child:
        limit = time.monotonic() + 40
        while not (tmp_path / "asked").exists():
            assert time.monotonic() < limit, "the metric was never asked"
            time.sleep(0.02)
        child.send_signal(stop)
        assert child.wait(20) == 130
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["asked", "in.onnx", "slow_metric.py"]
