"""The fuzzer: a few of its cases, that they repeat, and that it knows which one did what."""

import subprocess
import sys
from pathlib import Path

import pytest

from models.fuzz.cases import Sound, make_case
from models.fuzz.run import lay_out, run_case, sound_files

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
