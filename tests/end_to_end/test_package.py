"""The package as people install it: an sdist and a wheel, each in a clean environment.

Nothing is downloaded. A new environment sees the packages that are installed beside these tests,
all but onnxlr itself, through links; the installer decides whether they are what onnxlr asks for.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.support.builders import linear, low_rank

pytest.importorskip("hatchling", reason="the extra test has hatchling")
pytest.importorskip("pip", reason="packages are installed by pip")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
OFFLINE = ("--no-index", "--no-build-isolation")
# Paths, constraints and settings of whoever runs the tests aren't those of who installs.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
CLEAN["PIP_CONFIG_FILE"] = os.devnull


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to succeed; what it prints."""
    done = subprocess.run(command, cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Environment:
    """A new virtual environment in which all but onnxlr is installed."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        base = {"base": str(folder), "platbase": str(folder)}
        paths = sysconfig.get_paths("venv", vars=base)
        self.folder, self.scripts = folder, Path(paths["scripts"])
        self.python = self.scripts / Path(sys.executable).name
        self.packages = Path(paths["purelib"])
        for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for path in Path(place).iterdir():
                # A .pth file would bring in what is installed to be edited.
                if "onnxlr" not in path.name and path.suffix != ".pth":
                    (self.packages / path.name).symlink_to(path)

    def install(self, package: Path) -> None:
        """Install a package with the extra ``cpu``, of which nothing may be missing."""
        wanted = f"onnxlr[cpu] @ {package.as_uri()}"
        run(sys.executable, *PIP, "--python", self.python, "install", *OFFLINE, wanted, cwd=ROOT)

    def files(self) -> set[str]:
        """The files of our two packages, compiled ones left out."""
        found = set()
        for name in ("onnxlr", "onnxlr_passes"):
            for path in (self.packages / name).rglob("*"):
                if path.is_file() and path.suffix != ".pyc":
                    found.add(path.relative_to(self.packages).as_posix())
        return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built from the files that are tracked or new."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    (path,) = built.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.install(wheel)
    return environment


def sources() -> set[str]:
    """What the wheel has to hold: the files of the two packages here."""
    found = set()
    for package in (ROOT / "onnxlr", ROOT / "passes" / "onnxlr_passes"):
        for path in package.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(path.relative_to(package.parent).as_posix())
    return found


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {n for n in names if re.match(r"onnxlr-[^/]+\.dist-info/", n)}
    assert names - metadata == sources()
    assert {"onnxlr/py.typed", "onnxlr_passes/py.typed", "onnxlr/report/page.css"} <= names
    assert any(n.endswith("/licenses/LICENSE") for n in metadata)


def test_the_sdist_holds_what_builds_and_explains_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO"} <= inside
    assert {"REFERENCE.md", "CONTRIBUTING.md"} <= inside
    assert {f"passes/{n}" if n.startswith("onnxlr_passes") else n for n in sources()} <= inside
    assert {n.partition("/")[0] for n in inside if "/" in n} == {"onnxlr", "passes"}


def test_the_metadata_is_that_of_the_project(installed: Environment) -> None:
    (path,) = installed.packages.glob("onnxlr-*.dist-info/METADATA")
    fields = HeaderParser().parsestr(path.read_text(encoding="utf-8"))
    assert fields["Summary"] == PROJECT["description"]
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == PROJECT["requires-python"]
    assert fields.get_all("Classifier") == PROJECT["classifiers"]
    assert fields["Keywords"].split(",") == sorted(PROJECT["keywords"])
    assert set(fields.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert fields["Description-Content-Type"] == "text/markdown"


def test_versions_are_bounded_above_only_where_a_reason_is_beside() -> None:
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for requirement in wanted:
        if re.search("<|==|~=|!=", requirement):
            assert re.search(f'"{re.escape(requirement)}",?[^"\n]*#', text), requirement


def test_what_builds_the_package_is_what_the_tests_build_it_with() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert set(build["requires"]) <= set(PROJECT["optional-dependencies"]["test"])


def test_the_classifiers_name_the_versions_of_python_that_are_tested() -> None:
    jobs = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (tested,) = re.findall(r"python: \[(.*)\]", jobs)
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert named == re.findall(r'"(.*?)"', tested)
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_its_commands_run_and_find_the_methods(installed: Environment, here: Path) -> None:
    code = "import onnxlr, onnxlr_passes; print(onnxlr.__file__); print(onnxlr_passes.__file__)"
    places = run(installed.python, "-c", code, cwd=here).splitlines()
    assert all(Path(place).is_relative_to(installed.packages) for place in places)
    as_module = run(installed.python, "-m", "onnxlr", "--version", cwd=here)
    script = shutil.which("onnxlr", path=str(installed.scripts))
    assert script
    assert run(script, "--version", cwd=here) == as_module
    (information,) = installed.packages.glob("onnxlr-*.dist-info")
    assert f"onnxlr-{as_module.split()[-1]}.dist-info" == information.name
    listed = run(script, "passes", cwd=here)
    assert all(name in listed for name in PROJECT["entry-points"]["onnxlr.passes"])


def test_it_does_the_readmes_job_with_a_model_of_ones_own(
    installed: Environment, here: Path
) -> None:
    rng = np.random.default_rng(0)
    weight = low_rank(rng, 256, 256, 8)
    onnx.save(linear(weight, rows="n"), here / "net.onnx")
    x = rng.standard_normal((400, 256)).astype(np.float32)
    np.savez(here / "samples.npz", x=x, label=(x @ weight).argmax(axis=1))
    script = shutil.which("onnxlr", path=str(installed.scripts))
    assert script
    files = ("--data", "samples.npz", "--labels", "label", "--report", "r.html", "--json", "r.json")
    goal = ("--target", "params=0.5")  # nothing that a busy machine's clock decides
    printed = run(script, "optimize", "net.onnx", "out.onnx", *files, *goal, cwd=here)
    assert "1 of 1 layers replaced" in printed
    report = json.loads((here / "r.json").read_text())
    assert report["output"]["params"] < 0.5 * report["input"]["params"]
    # The page's style is a data file of the package.
    css = (ROOT / "onnxlr" / "report" / "page.css").read_text(encoding="utf-8")
    assert css.strip().splitlines()[-1] in (here / "r.html").read_text(encoding="utf-8")


def test_the_sdist_installs_to_the_same_files(
    sdist: Path, installed: Environment, tmp_path: Path
) -> None:
    other = Environment(tmp_path / "venv")
    other.install(sdist)
    assert other.files() == installed.files()
    assert run(other.scripts / "onnxlr", "--version", cwd=tmp_path).startswith("onnxlr")
