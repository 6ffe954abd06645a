"""The fuzzer: a few of its cases, that they repeat, and that it knows which one did what."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from models.fuzz import run
from models.fuzz.cases import Sound, make_case
from models.fuzz.run import lay_out, run_case, sound_files
from onnxlr.errors import CrashError
from onnxlr.system import sandbox
from onnxlr.system.deadline import Deadline

pytestmark = pytest.mark.usefixtures("trials")


@pytest.fixture(scope="module")
def sound() -> Sound:
    return sound_files()


@pytest.mark.parametrize("number", range(24))
def test_a_few_cases_of_the_fuzzer(number: int, sound: Sound, tmp_path: Path) -> None:
    case = make_case(20, number, sound)
    lay_out(case, tmp_path)
    verdict = run_case(case, tmp_path, lambda _: None)
    assert verdict.word in ("passed", "refused"), verdict


def test_what_runs_left_in_the_cache_is_there_to_be_broken(sound: Sound) -> None:
    assert {Path(name).suffix for name in sound.cache} == {".json", ".npz"}


def test_the_same_number_makes_the_same_case(sound: Sound) -> None:
    for number in range(40):
        assert make_case(1, number, sound) == make_case(1, number, sound)


def spoil(_: str) -> str:
    """Say so as a function that fails."""
    raise ValueError("spoilt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of every fork
def test_trials_in_a_fork_end_as_those_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    here = sandbox._Sandbox()
    monkeypatch.setattr(sandbox, "_start_executor", run._Forked)
    soon = partial(here.run, deadline=Deadline(20.0), task="work")
    assert soon(pow, 2, 10) == 1024
    with pytest.raises(ValueError, match="spoilt"):
        soon(spoil, "now")
    with pytest.raises(CrashError, match="work crashes ONNX Runtime"):
        soon(os._exit, 1)
    with pytest.raises(CrashError, match="work takes more than 0 s"):
        here.run(time.sleep, 60, deadline=Deadline(0.2), task="work")
    assert soon(pow, 2, 11) == 2048


def test_the_fuzzer_knows_which_case_crashed(tmp_path: Path) -> None:
    """Of four cases the second kills its process and the third never ends."""
    code = f"""
import os, signal, time
from pathlib import Path
from models.fuzz import command as fuzz
from models.fuzz.cases import Case, Sound
made = 0
def run(case, folder, tell):
    tell("inspect")
    if folder.name.startswith("case-1-"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if folder.name.startswith("case-2-"):
        time.sleep(60)
    return fuzz.Verdict("passed")
fuzz.run_case = run
fuzz.make_case = lambda *_: Case("kind", {{"in.onnx": b""}}, [])
fuzz._is_slow = lambda _: False
supervisor = fuzz.Supervisor(0, Path({str(tmp_path)!r}), Sound(b"", b"", {{}}), 1.0)
assert supervisor.run(0, time.monotonic() + 50, 4) == 4
print(sorted((place, numbers) for place, numbers in supervisor.tally.finds.items()))
print(supervisor.tally.counts["kind"]["passed"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=90
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "2"
    assert lines[-2] == (
        "[('inspect: ended by SIGSEGV', [1]), ('inspect: hangs for more than 1 s', [2])]"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"find-1", "find-2", "stderr.txt"}
