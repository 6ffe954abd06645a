"""The guide of models/README.md, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxlr.cli.commands import main

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent.parent


def test_the_guide_ends_in_a_smaller_model_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    guide = text.split("<!-- guide -->")[1].split("<!-- /guide -->")[0]
    script, command = re.findall(r"```(?:python)?\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "script.py").write_text("import torch\ntorch.manual_seed(0)\n" + script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, capture_output=True)
    name, *arguments = command.split()
    assert name == "onnxlr"
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert re.search(r"svd +16 +200,704 → 16,640 .* 0\.000 ", done.output)
    assert "agreement 100.00%" in done.output
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "small.onnx")]
    assert sizes[1] < 0.15 * sizes[0]
