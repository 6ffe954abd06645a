"""``onnxlr olive-config``: Olive's package configuration with our pass, without importing Olive."""

import ast
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxlr.cli.commands import main
from onnxlr.olive.package import OUR_NAME

ROOT = Path(__file__).parents[2]
THEIRS = {
    "passes": {
        "OnnxDynamicQuantization": {
            "module_path": "olive.passes.onnx.quantization.OnnxDynamicQuantization",
            "supported_providers": ["CPUExecutionProvider"],
        }
    },
    "extra_dependencies": {"ort": ["onnxruntime"]},
}


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["olive-config", *words])
    assert result.exit_code == code, result.output
    assert not isinstance(result.exception, Exception)
    return result.output


@pytest.fixture
def olive(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of an Olive that is installed, and can't be imported."""
    package = here / "installed" / "olive"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('Olive was imported')\n")
    (package / "olive_config.json").write_text(json.dumps(THEIRS))
    monkeypatch.delitem(sys.modules, "olive", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    return package / "olive_config.json"


def test_our_pass_stands_among_olives(olive: Path) -> None:
    assert "--package-config olive_config.json" in run()
    written = json.loads(Path("olive_config.json").read_text())
    ours = written["passes"].pop(OUR_NAME)
    assert written == THEIRS
    assert json.loads(olive.read_text()) == THEIRS
    module, _, name = ours["module_path"].rpartition(".")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert name == OUR_NAME
    assert name in {item.name for item in tree.body if isinstance(item, ast.ClassDef)}
    assert ours["run_on_target"] is True  # where it times the models


def test_it_is_written_where_one_likes_but_not_over_olives_own(olive: Path) -> None:
    run("mine.json")
    assert OUR_NAME in json.loads(Path("mine.json").read_text())["passes"]
    assert "name another output" in run(str(olive), code=2)
    assert json.loads(olive.read_text()) == THEIRS
    assert "doesn't exist" in run("nowhere/mine.json", code=1)
    assert "only --json does" in run("-", code=2)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"passes": {}}', '{"passes": []}'])
def test_another_olive_is_told_to_be_none_we_know(olive: Path, content: str) -> None:
    olive.write_text(content)
    text = run(code=1)
    assert text.count("\n") == 1
    assert "lists no passes" in text
    assert not Path("olive_config.json").exists()


@pytest.mark.parametrize("namespace", [False, True])
def test_without_olive_a_line_says_how_to_get_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, namespace: bool
) -> None:
    if namespace:  # a folder of that name, as a clone of a project may hold
        (here / "olive").mkdir()
    monkeypatch.delitem(sys.modules, "olive", raising=False)
    monkeypatch.setattr(sys, "path", [str(here)])
    assert run(code=1) == "onnxlr: Olive isn't installed here: pip install 'onnxlr[olive]'\n"


def test_only_the_pass_imports_olive_and_only_olive_imports_the_pass() -> None:
    for path in (ROOT / "onnxlr").rglob("*.py"):
        names = set()
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(item, ast.ImportFrom):
                names |= {f"{item.module}.{alias.name}" for alias in item.names}
            elif isinstance(item, ast.Import):
                names |= {alias.name for alias in item.names}
        assert not any(n.startswith("onnxlr.olive.optimize_pass") for n in names), path
        assert path.name == "optimize_pass.py" or not any(n.startswith("olive.") for n in names)
