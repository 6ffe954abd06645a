"""The house: which way imports point, what imports cost, what is exported and documented."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.cli.commands import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "onnxlr"

# From the ground up: a package, or a file beside them, imports only from those before it.
ROOMS = (
    *("errors", "version", "progress", "types", "limits", "p_values"),
    *("system", "decompose", "behind", "options", "model", "layers", "prepare", "methods"),
    *("calibrate", "candidates", "widths", "rewrite", "verify", "plan", "courses", "report"),
    *("jobs", "api", "training", "olive"),
    "",  # the package itself: the public names
    *("cli", "__main__"),
)
FLOOR = {name: i for i, name in enumerate(ROOMS)}
MOST_LINES, MOST_STATEMENT_LINES = 350, 60  # of a file; of a function without its docstring
MOST_FLOORS = 6  # of files inside a package, each above all that it imports


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path): path for path in SOURCES}


def room_of(name: str) -> str:
    return name.split(".")[0]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> set[str]:
    """Every module of onnxlr that a file imports, inside functions too."""
    assert path.read_text(encoding="utf-8").count("\n") <= MOST_TEST_LINES
    names = set()
    for item in ast.walk(parsed(path)):
        if isinstance(item, ast.ImportFrom):
            assert item.level == 0, f"{path} imports by dots"
            if (item.module or "").split(".")[0] == "onnxlr":
                base = (item.module or "").removeprefix("onnxlr").lstrip(".")
                for alias in item.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    names.add(inner if inner in MODULES else base)
        elif isinstance(item, ast.Import):
            named = (a.name.split(".", 1) for a in item.names)
            names |= {rest[0] if rest else "" for top, *rest in named if top == "onnxlr"}
    return names - {module_name(path)}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(module_name(path))
    assert room in FLOOR, f"{room} has no place in the order: say where it belongs"
    for other in imported(path):
        assert room_of(other) == room or FLOOR[room_of(other)] < FLOOR[room], f"imports {other}"


def test_no_file_imports_itself_in_a_circle_and_packages_are_low() -> None:
    floors: dict[str, int] = {}

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"a circle: {' → '.join((*above, name))}"
        if name not in floors:
            inside = [o for o in imported(MODULES[name]) if room_of(o) == room_of(name)]
            floors[name] = 1 + max((floor(o, (*above, name)) for o in inside), default=0)
        return floors[name]

    assert max(floor(name) for name in MODULES) <= MOST_FLOORS


@pytest.mark.parametrize("room", [r for r in ROOMS if (PACKAGE / r / "__init__.py").is_file()])
def test_a_package_says_what_is_in_it_and_what_it_imports(room: str) -> None:
    doc = ast.get_docstring(parsed(PACKAGE / room / "__init__.py"))
    assert doc
    assert room in ("", "training", "decompose") or "imports" in doc


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_the_engine_never_imports_passes(path: Path) -> None:
    assert "onnxlr_passes" not in path.read_text(encoding="utf-8")


def test_the_order_names_no_ghosts() -> None:
    assert set(ROOMS) == {room_of(name) for name in MODULES}


@pytest.mark.parametrize(
    "path",
    [p for d in ("onnxlr", "passes", "tests", "models") for p in (ROOT / d).rglob("*.py")],
    ids=str,
)
def test_a_file_opens_with_what_it_is_for(path: Path) -> None:
    doc = ast.get_docstring(parsed(path))
    assert doc
    assert doc.splitlines()[0].endswith(".")


@pytest.mark.parametrize(
    "path", [p for d in ("onnxlr", "passes") for p in sorted((ROOT / d).rglob("*.py"))], ids=str
)
def test_files_and_functions_are_short(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= MOST_LINES
    for item in ast.walk(parsed(path)):
        if isinstance(item, ast.FunctionDef):
            statements = item.body[1:] if ast.get_docstring(item) else item.body
            if statements:
                lines = (item.body[-1].end_lineno or 0) - statements[0].lineno + 1
                assert lines <= MOST_STATEMENT_LINES, item.name


TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_TEST_LINES = 600
NO_PACKAGES = {"models", "end_to_end", "robustness", "support"}  # the other folders of tests


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_stand_where_they_belong_and_share_what_is_support(path: Path) -> None:
    folder = path.relative_to(ROOT / "tests").parts[0].removesuffix(path.name)
    assert folder in ("", *NO_PACKAGES) or (PACKAGE / folder / "__init__.py").is_file()
    assert path.read_text(encoding="utf-8").count("\n") <= MOST_TEST_LINES
    names = set()
    for item in ast.walk(parsed(path)):
        if isinstance(item, ast.ImportFrom):
            names |= {f"{item.module}.{alias.name}" for alias in item.names}
        elif isinstance(item, ast.Import):
            names |= {alias.name for alias in item.names}
    imported_tests = {n for n in names if n.startswith("tests.") and ".test_" in n}
    assert not imported_tests, "what several files need belongs in tests/support"
    assert folder == "models" or not {n for n in names if n.split(".")[0] == "models"}


def test_the_core_needs_neither_torch_nor_matplotlib_nor_a_runtime() -> None:
    code = (
        "import sys\n"
        "import onnxlr, onnxlr.cli.commands, onnxlr.cli.actions, onnxlr_passes.svd\n"
        "slow = ('torch', 'matplotlib', 'onnxruntime', 'pandas', 'scipy.stats')\n"
        "print([m for m in slow if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exports() -> None:
    assert sorted(onnxlr.__all__) == [
        "BudgetError",
        "ClusterError",
        "DataError",
        "ModelError",
        "OnnxlrError",
        "OutputError",
        "Result",
        "RuntimeMissingError",
        "UsageError",
        "__version__",
        "apply",
        "bench",
        "compare",
        "inspect",
        "optimize",
    ]
    assert all(hasattr(onnxlr, name) for name in onnxlr.__all__)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_with_an_example(command: str) -> None:
    made = main.commands[command]
    text = made.help or ""
    assert re.search(rf"Examples?:\s+(onnxlr optimize .*\n\s+)?onnxlr {command}", text)
    options = [p for p in made.params if isinstance(p, click.Option)]
    assert all(p.help for p in options), [p.name for p in options if not p.help]


def test_the_help_of_all_commands_is_whole_and_says_what_holds_for_each() -> None:
    text = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    assert "..." not in text.partition("Commands:")[2]  # each fits on its line
    reference = (ROOT / "REFERENCE.md").read_text(encoding="utf-8")
    section = reference.partition("## Environment")[2].partition("\n## ")[0]
    assert re.findall(r"^ +([A-Z_]+)=", text, re.M) == re.findall(r"^\| `(\w+)`", section, re.M)
    codes = reference.partition("<!-- exit codes -->")[2].partition("<!-- /")[0]
    assert re.findall(r"^ +(\d+)  ", text, re.M) == re.findall(r"^\| (\d+)", codes, re.M)


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    allowed = dict(
        line.split(">=") for line in [*project["dependencies"], *extras["cpu"], *extras["test"]]
    )
    for name in ("mypy", "ruff", "scipy-stubs"):  # which are only run with the newest
        del allowed[name]
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert tested.pop("pyparsing")  # not ours
    assert {name: f"{version}.0.0".split(".")[:3] for name, version in allowed.items()} == {
        name: version.split(".") for name, version in tested.items()
    }


def test_the_changelog_knows_the_version() -> None:
    assert f"## {onnxlr.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
