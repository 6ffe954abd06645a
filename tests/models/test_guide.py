"""The guides of models/README.md and models/GUIDE.md, run as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxlr.cli.commands import main
from tests.support.limits import FEW
from tests.support.scripts import run_python

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
    monkeypatch.chdir(tmp_path)
    run_python(["script.py"])
    name, *arguments = command.split()
    assert name == "onnxlr"
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert re.search(r"svd +16 +200,704 → 16,640 .* 0\.000 ", done.output)
    assert "agreement 100.00%" in done.output
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "small.onnx")]
    assert sizes[1] < 0.15 * sizes[0]


def test_the_long_guide_ends_in_a_model_that_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "models" / "GUIDE.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- run -->\n```(python)?\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("<!-- run -->") == 9
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    # What is tested here is that the guide runs, not how good its models are.
    monkeypatch.setattr("onnxlr.api.functions.LIMITS", FEW)
    said = ""
    for language, block in blocks:
        words = shlex.split(block)
        if language == "python":
            (tmp_path / "block.py").write_text(block, encoding="utf-8")
            words = ["python", "block.py"]
        if words[0] == "onnxlr":
            done = CliRunner().invoke(main, words[1:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
        else:
            assert words[0] == "python"
            said = run_python(words[1:])
    share = re.fullmatch(r"(\d+\.\d)% right\n\d+ microseconds each\n", said)
    assert share is not None
    behind = json.loads(Path("int8.json").read_text(encoding="utf-8"))["behind"]
    sizes = [Path(f"{name}.onnx").stat().st_size for name in ("model", "with-int8", "int8")]
    assert [row["bytes"] for row in behind["rows"] if row["what"] != "int8-dynamic"] == sizes
    assert sizes[2] < 0.3 * sizes[0]
    assert Path("small.onnx").stat().st_size < sizes[0]
    assert float(share[1]) > 70
    drawn = Path("guide.svg").read_text(encoding="utf-8")
    assert "low rank, then int8-dynamic" in drawn
    for picture in (drawn, (ROOT / "models" / "guide.svg").read_text(encoding="utf-8")):
        assert picture.startswith("<?xml")
        assert len(picture.encode()) < 60_000
