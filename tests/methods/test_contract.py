"""What the engine and the methods know of each other: one import, and no question of kinds."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnxlr.methods
from onnxlr.methods.registry import installed_passes

ROOT = Path(__file__).parents[2]
PASSES = sorted((ROOT / "passes").rglob("*.py"))
SOURCES = sorted((ROOT / "onnxlr").rglob("*.py")) + PASSES
KINDS = {"ChainPass", "WeightPass", "ConvPass", "CpPass", "TiledPass"}


def tree(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PASSES, ids=lambda path: path.stem)
def test_a_built_in_method_imports_from_one_place(path: Path) -> None:
    for item in tree(path):
        if isinstance(item, ast.ImportFrom):
            top, *rest = (item.module or "").split(".")
            assert top != "onnxlr_passes"
            assert top != "onnxlr" or rest == ["methods"], item.module
        elif isinstance(item, ast.Import):
            assert not any(name.name.startswith("onnxlr") for name in item.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_asks_of_what_kind_a_method_is(path: Path) -> None:
    """A method says it itself: ``at_load``, ``barred``, ``install``."""
    for item in tree(path):
        if isinstance(item, ast.Call) and isinstance(item.func, ast.Name):
            asks = item.func.id in ("isinstance", "issubclass")
            names = {
                n.id for arg in item.args[1:] for n in ast.walk(arg) if isinstance(n, ast.Name)
            }
            assert not asks or not names & KINDS, f"line {item.lineno}"


def test_the_face_names_what_it_has() -> None:
    names = onnxlr.methods.__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(onnxlr.methods, name) for name in names)


def test_the_contract_stays_small() -> None:
    """What a convolution's method has to say beyond its words, and what any other has."""
    assert onnxlr.methods.ConvPass.__abstractmethods__ == frozenset()
    assert onnxlr.methods.ChainPass.__abstractmethods__ == {
        *("refuse", "full_rank", "unfoldings", "factor_shapes", "factorize", "compose", "write")
    }


@pytest.mark.parametrize("name", sorted(installed_passes()))
def test_at_load_is_what_bars_a_method(name: str) -> None:
    graph_pass = installed_passes()[name].graph_pass
    assert graph_pass.at_load == hasattr(graph_pass, "restore")
    assert graph_pass.at_load != hasattr(graph_pass, "write")
