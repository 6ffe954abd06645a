"""The steps of the GitHub action, run as a runner would: by bash, with its inputs and files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from tests.support.builders import make_model, node

ACTION = Path(__file__).parents[2] / "action.yml"


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(ACTION.read_text())
    return content


@pytest.fixture
def models(here: Path) -> Path:
    """Models of a pull request in a folder whose name has a space: the base, an equal, a worse."""
    folder = here / "pull request"
    folder.mkdir()
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 10)).astype(np.float32)
    moved = weight + 0.5 * rng.standard_normal(weight.shape).astype(np.float32)
    for name, values in (("base", weight), ("same", weight), ("worse", moved)):
        model = make_model(
            [node("MatMul", ["x", "w"], "y")], {"x": ("n", 16)}, ["y"], {"w": values}
        )
        onnx.save(model, folder / f"{name}.onnx")
    x = rng.standard_normal((400, 16)).astype(np.float32)
    labels = (x @ weight).argmax(axis=1)
    np.savez(folder / "s.npz", x=x, label=labels)
    return folder


def value(text: str, inputs: dict[str, str]) -> str:
    """What the runner makes of an expression in ``env``."""
    places = {"github.action_path": str(ACTION.parent)}
    places |= {f"inputs.{name}": given for name, given in inputs.items()}
    return re.sub(r"\$\{\{ *([^ }]+) *\}\}", lambda m: places[m[1]], text)


def run_step(
    action: dict[str, Any], step_id: str, folder: Path, **given: str
) -> tuple[int, str, dict[str, str]]:
    """The exit code of a step, the summary that it leaves, and its outputs."""
    inputs = {name: str(row.get("default", "")) for name, row in action["inputs"].items()}
    inputs |= {name.replace("_", "-"): text for name, text in given.items()}
    (step,) = [s for s in action["runs"]["steps"] if s.get("id") == step_id]
    assert step["shell"] == "bash"
    assert "${{" not in step["run"]  # inputs come by the environment: they are never code
    summary, outputs = folder / "summary.md", folder / "outputs.txt"
    summary.write_text("before\n")
    outputs.write_text("")
    environment = {
        **os.environ,
        **{name: value(text, inputs) for name, text in step["env"].items()},
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_OUTPUT": str(outputs),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash isn't installed")
    command = [bash, "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    code = subprocess.run(command, env=environment, cwd=folder, timeout=300).returncode
    rows = (line.partition("=") for line in outputs.read_text().splitlines())
    return code, summary.read_text(), {name: text for name, _, text in rows}


def test_an_equal_model_passes_and_the_summary_shows_both(
    action: dict[str, Any], models: Path
) -> None:
    files = {"base": "base.onnx", "head": "same.onnx", "data": "s.npz", "labels": "label"}
    code, summary, outputs = run_step(action, "compare", models, max_slowdown="5", **files)
    assert code == 0
    assert summary.startswith("before\n### same.onnx beside base.onnx")
    assert "**Within the limits.**" in summary
    assert Path(outputs["json"]).is_file()
    assert action["outputs"]["json"]["value"] == "${{ steps.compare.outputs.json }}"


def test_a_worse_model_fails_the_step_and_the_summary_says_why(
    action: dict[str, Any], models: Path
) -> None:
    files = {"base": "base.onnx", "head": "worse.onnx", "data": "s.npz", "labels": "label"}
    code, summary, outputs = run_step(action, "compare", models, **files)
    assert code == 3
    assert "**Outside the limits:** top1 lost" in summary
    assert Path(outputs["json"]).is_file()


def test_what_cannot_be_read_fails_the_step_without_a_summary(
    action: dict[str, Any], models: Path
) -> None:
    code, summary, _ = run_step(action, "compare", models, base="base.onnx", head="$(touch x).onnx")
    assert code == 1
    assert summary == "before\n"
    assert not (models / "x").exists()  # a name isn't run


def test_the_steps_set_python_up_and_install_this_very_package(action: dict[str, Any]) -> None:
    assert action["runs"]["using"] == "composite"
    python, install, _ = action["runs"]["steps"]
    assert python["uses"].startswith("actions/setup-python@")
    assert value(install["env"]["SOURCE"], {}) == str(ACTION.parent)
    assert install["run"] == 'python -m pip install "$SOURCE[cpu]"'
    assert (ACTION.parent / "pyproject.toml").is_file()
