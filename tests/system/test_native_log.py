"""What native code prints: lines that nobody asked for are dropped, and nothing else is lost."""

import subprocess
import sys

import pytest

from onnxlr.system.native_log import without_lines

SCRIPT = """
import ctypes, os
from onnxlr.system.native_log import without_lines

def chatty():
    if os.name == "posix":
        ctypes.CDLL(None).puts(b"Noise::of a library")
    os.write(1, b"Noise::unbuffered\\n")
    os.write(1, b"of another thread\\n")
    print("of Python")
    return 7

print("before")
print(without_lines("Noise::", chatty))
print("Noise::afterwards")
"""


def test_only_lines_of_the_library_are_dropped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        *("before", "of another thread", "of Python", "7", "Noise::afterwards")
    ]


def test_errors_come_out_and_so_does_what_was_printed(capfd: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        print("said before")
        raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        without_lines("Noise::", failing)
    print("said after")
    assert capfd.readouterr().out.splitlines() == ["said before", "said after"]


def test_a_closed_output_is_no_obstacle() -> None:
    script = "import os; os.close(1); import sys; sys.stdout = None\n"
    script += "from onnxlr.system.native_log import without_lines\n"
    script += "sys.exit(without_lines('Noise::', lambda: 7))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7
