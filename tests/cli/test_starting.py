"""How the command starts: what reading words imports, and how imports that come later end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onnxlr.cli.commands import main

HEAVY = {
    *("numpy", "scipy", "onnx", "onnx_ir", "onnxruntime", "ml_dtypes", "google", "matplotlib"),
    *("torch", "rich", "joblib", "psutil", "platformdirs", "threadpoolctl"),
}
USUAL_SIGNALS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
START = "import sys; sys.argv[0] = 'onnxlr'; from onnxlr.__main__ import main; main()"


def imported_by(command: str) -> tuple[int, set[str]]:
    """The exit code of a command, and the packages that it imports in all its processes."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "onnxlr", *command.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip() for line in lines}
    assert "onnxlr.cli.commands" in names
    return done.returncode, {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("command", ["--version", "-h", *(f"{name} -h" for name in main.commands)])
def test_help_imports_nothing_heavy(command: str) -> None:
    code, packages = imported_by(command)
    assert code == 0
    assert not packages & HEAVY


@pytest.mark.parametrize(
    "command",
    [
        *("nope", "optimize", "optimize in.onnx", "optimize in.onnx -", "inspect in.onnx --nope"),
        *("bench in.onnx --threads many", "optimize in.onnx out.onnx --verify nope"),
    ],
)
def test_wrong_usage_imports_nothing_heavy(command: str) -> None:
    code, packages = imported_by(command)
    assert code == 2
    assert not packages & HEAVY


def test_what_a_command_needs_is_imported_by_it() -> None:
    code, packages = imported_by("passes")
    assert code == 0
    assert {"numpy", "onnx", "rich"} <= packages


def stand_in_for_numpy(folder: Path, body: str) -> dict[str, str]:
    """An environment in which numpy is a file of these statements."""
    (folder / "numpy.py").write_text(f"import os, pathlib, time\n{body}\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("statement", ["raise ImportError('no such symbol')", "1 / 0", "import no"])
def test_a_package_that_cannot_be_imported_is_told_in_a_line(
    statement: str, tmp_path: Path
) -> None:
    environment = stand_in_for_numpy(tmp_path, statement)
    for command, code in (("--version", 0), ("inspect in.onnx", 1)):
        done = subprocess.run(
            [sys.executable, "-c", START, *command.split()],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
    assert done.stderr.startswith("onnxlr: can't be started: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_amid_an_import_ends_the_command_whatever_the_library_makes_of_it(
    tmp_path: Path,
) -> None:
    body = (
        "pathlib.Path('importing').touch()\n"
        "for _ in range(600):\n"
        "    try:\n"
        "        time.sleep(0.1)\n"
        "    except BaseException:\n"
        "        pass"
    )
    with subprocess.Popen(
        [sys.executable, "-c", USUAL_SIGNALS + START, "inspect", "in.onnx"],
        env=stand_in_for_numpy(tmp_path, body),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        limit = time.monotonic() + 60
        while not (tmp_path / "importing").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, text = child.communicate(timeout=9)  # it isn't killed for not hearing, which takes 10 s
    assert child.returncode == 130
    assert text == "onnxlr: interrupted before anything was begun\n"
