"""A package of somebody else's that brings methods: what it takes, and that they work."""

import ast
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxlr
from tests.support import commands
from tests.support.builders import low_rank, make_model, node, relative, replaced, run
from tests.support.installed import forget_installed, write_metadata
from tests.support.pass_cases import CASES, TOLERANCE, assert_same_outputs, the_layer

PACKAGE = Path(__file__).parent / "third_party"
SOURCES = sorted(PACKAGE.glob("*.py"))
MOST_LINES = 60
# The built-in method that supports the same layers, where they are the same.
LIKE = {"random-channel-svd": "channel-svd", "columns": None}


def imported(path: Path) -> set[str]:
    """The modules of onnxlr, and of its passes, that a file imports from."""
    modules: set[str] = set()
    for item in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(item, ast.ImportFrom):
            modules.add(item.module or "")
        elif isinstance(item, ast.Import):
            modules.update(name.name for name in item.names)
    return {m for m in modules if m.split(".")[0] in ("onnxlr", "onnxlr_passes")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_new_method_is_short_and_imports_from_one_place(path: Path) -> None:
    assert imported(path) == {"onnxlr.methods"}
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the package as an installer leaves it."""
    folder = tmp_path / "site"
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text("utf-8"))["project"]
    passes = project["entry-points"]["onnxlr.passes"]
    write_metadata(folder, project["name"], project["version"], passes)
    for source in SOURCES:
        shutil.copy(source, folder)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package on the path of this process."""
    monkeypatch.syspath_prepend(site)
    forget_installed()
    yield
    monkeypatch.undo()
    for source in SOURCES:
        sys.modules.pop(source.stem, None)
    forget_installed()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("method", LIKE)
def test_its_methods_are_the_identity_at_full_rank(method: str) -> None:
    supported = []
    for case, (make, methods) in CASES.items():
        model = make()
        layer, graph_pass = the_layer(model, method)
        if (reason := graph_pass.refuse(layer)) is not None:
            assert method in reason
            assert LIKE[method] not in methods
            continue
        supported.append(case)
        chain = replaced(model, method, graph_pass.full_rank(layer))
        assert_same_outputs(model, chain, TOLERANCE)
    assert supported[:1] == ["matmul" if method == "columns" else "conv"]


def planted() -> onnx.ModelProto:
    """A Conv whose lowered kernel has rank 6, and a MatMul of rank 3."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Conv", ["x", "k"], "h", "conv", pads=[1, 1, 1, 1]),
        node("MatMul", ["h", "w"], "y", "fc"),
    ]
    kernel = low_rank(rng, 48, 32 * 9, 6).reshape(48, 32, 3, 3)
    weights = {"k": kernel, "w": low_rank(rng, 16, 64, 3)}
    return make_model(nodes, {"x": (1, 32, 16, 16)}, ["y"], weights)


@pytest.mark.usefixtures("installed")
def test_its_factors_are_fitted_to_data(tmp_path: Path) -> None:
    """A form is all that it takes: on inputs of few directions they lose less than the weight's."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((32, 48)).astype(np.float32)
    inputs = (rng.standard_normal((256, 32)) * np.geomspace(1, 0.01, 32)).astype(np.float32)
    model = make_model(
        [node("MatMul", ["x", "w"], "y", "fc")], {"x": ("n", 32)}, ["y"], {"w": weight}
    )
    np.savez(tmp_path / "inputs.npz", x=inputs[:, None])
    errors = []
    for data in (None, tmp_path / "inputs.npz"):
        result = onnxlr.optimize(
            model, method="columns", rank=6, max_drop=1, measure=False, data=data
        )
        before, after = (run(m, {"x": inputs})[0] for m in (model, result.model))
        errors.append(relative(before, after))
    assert errors[1] < 0.5 * errors[0]


def test_the_command_knows_them(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = planted()
    onnx.save(model, tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        done = commands.run(*arguments, patches={"sys.path": [str(site), *sys.path]})
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("passes").count("onnxlr-third-party") == len(LIKE)
    methods = [word for name in LIKE for word in ("--method", name)]
    shown = command(
        "optimize", "in.onnx", "out.onnx", *methods, "--rank", "exact", "--max-drop", "0.001"
    )
    assert "2 of 2 layers replaced" in shown
    written = onnx.load(tmp_path / "out.onnx")
    shapes = {tuple(t.dims) for t in written.graph.initializer}
    assert shapes == {(6, 32, 3, 3), (48, 6, 1, 1), (16, 3), (3, 64)}
    feed = {"x": np.random.default_rng(2).standard_normal((1, 32, 16, 16)).astype(np.float32)}
    assert relative(run(model, feed)[0], run(written, feed)[0]) < 1e-5
