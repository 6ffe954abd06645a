"""How the command ends: by a signal at any moment, by a crash, with a line and nothing left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

import onnxlr
from onnxlr.errors import one_line
from onnxlr.system.deadline import TRIAL_VARIABLE
from onnxlr.system.process import can_start_threads, check_resource_limits
from onnxlr.system.signals import END_SIGNALS, Interrupt
from tests.support import commands
from tests.support.builders import linear, low_rank

pytestmark = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="needs a safe fork")

OPTIMIZE = ("optimize", "in.onnx", "out.onnx", "--rank", "3", "--metric", "odd:f", "--quiet")
COMMAND = [sys.executable, "-m", "onnxlr", *OPTIMIZE]
SHORT_GRACE = {"onnxlr.__main__._GRACE_SECONDS": 2}
start = partial(commands.start, *OPTIMIZE)
run = partial(commands.run, *OPTIMIZE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    weight = low_rank(np.random.default_rng(0), 64, 48, 3)
    onnx.save(linear(weight, rows="n", name="fc"), "in.onnx")
    return tmp_path


def metric(body: str) -> None:
    Path("odd.py").write_text(
        "import os, pathlib, signal, time\n"
        "def f(session):\n"
        "    pathlib.Path('asking').write_text(str(os.getpid()))\n"
        "    os.replace('asking', 'asked')\n"  # who waits for it finds it whole
        f"    {body}\n"
    )


def just_started() -> "subprocess.Popen[str]":
    """The command in a new interpreter, just after it has forked."""
    child = subprocess.Popen(
        COMMAND,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hearing,
    )
    wait_for(lambda: bool(psutil.Process(child.pid).children()))
    return child


def asking(patches: Mapping[str, object] | None = None) -> commands.Child:
    """The command as leader of a process group, while it waits for the metric."""
    child = start(session=True, patches=patches)
    wait_for(Path("asked").exists)
    return child


def hearing() -> None:
    """What is begun in the background, or under nohup, is to ignore some of them."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def wait_for(holds: Callable[[], bool], every: float = 0.01) -> None:
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(every)


def names() -> list[str]:
    return sorted(p.name for p in Path().iterdir())


@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("to", [os.kill, os.killpg])
@pytest.mark.usefixtures("here")
def test_ctrl_c_while_it_starts(to: Callable[[int, int], None], seconds: float) -> None:
    metric("time.sleep(60)")
    with just_started() as child:
        time.sleep(seconds)
        to(child.pid, signal.SIGINT)
        _, told = child.communicate(timeout=30)
        assert child.returncode == 130
    assert told.startswith("onnxlr: interrupted")
    assert len(told.splitlines()) == 1
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2])
@pytest.mark.usefixtures("here")
def test_ctrl_c_while_a_process_of_ours_starts(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
    metric("time.sleep(60)")

    def starting() -> bool:
        """Whether the process that forks workers, a child of the command's, has forked one."""
        for process in psutil.Process(child.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, ValueError):  # it has just ended
                if [p.pid for p in process.parents()].index(child.pid) == 2:
                    return True
        return False

    with start(session=True) as child:
        wait_for(starting, every=0.03)
        time.sleep(seconds)
        os.killpg(child.pid, signal.SIGINT)
        _, told = child.communicate(timeout=30)
        assert child.returncode == 130
    assert told.startswith("onnxlr: interrupted")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
@pytest.mark.usefixtures("here")
def test_a_wish_that_comes_twice_is_heard_once(stop: signal.Signals) -> None:
    metric("time.sleep(60)")
    with asking() as child:
        for to in (os.killpg, os.kill, os.killpg):
            to(child.pid, stop)
        _, told = child.communicate(timeout=30)
        assert child.returncode == 130
    assert told == "onnxlr: interrupted; no file was left half-written\n"
    assert names() == ["asked", "in.onnx", "odd.py"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGSEGV, "a library crashed (SIGSEGV), most likely ONNX Runtime"),
        (signal.SIGFPE, "a library crashed (SIGFPE), most likely ONNX Runtime"),
        (signal.SIGBUS, "a file that was being read was cut short"),
        (signal.SIGKILL, "the system ran out of memory"),
        (signal.SIGVTALRM, "stopped by SIGVTALRM"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_brings_it_down_is_told(number: signal.Signals, words: str) -> None:
    metric(f"os.kill(os.getpid(), {int(number)})")
    done = run()
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("out.onnx").exists()
    metric("return 1.0")  # and the next run clears away what it left
    done = run()
    assert done.returncode == 0, done.stderr
    assert names() == ["asked", "in.onnx", "odd.py", "out.onnx"]


@pytest.mark.usefixtures("here")
def test_the_work_ends_with_whoever_asked_for_it() -> None:
    metric("time.sleep(60)")
    with asking() as child:
        working = int(Path("asked").read_text())
        assert working != child.pid
        child.send_signal(signal.SIGKILL)
        child.wait(20)
        wait_for(lambda: not psutil.pid_exists(working))
    assert not Path("out.onnx").exists()


@pytest.mark.usefixtures("here")
def test_what_it_was_told_to_ignore_is_ignored() -> None:
    metric("time.sleep(1); return 1.0")
    deaf = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with start(before=deaf) as child:
        wait_for(Path("asked").exists)
        child.send_signal(signal.SIGHUP)
        assert child.wait(60) == 0
    assert Path("out.onnx").exists()


@pytest.mark.usefixtures("here")
def test_a_parent_that_leaves_its_children_alone() -> None:
    metric("return 1.0")
    careless = partial(signal.signal, signal.SIGCHLD, signal.SIG_IGN)  # it is inherited
    done = run(before=careless)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "before",
    [
        partial(signal.pthread_sigmask, signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGALRM)),
        partial(signal.alarm, 3600),
    ],
    ids=["signals wait", "an alarm"],
)
@pytest.mark.usefixtures("here")
def test_what_a_parent_leaves_behind(before: Callable[[], object]) -> None:
    """Its blocked signals and its alarm are those of what it begins, or becomes; ours is deaf."""
    metric("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); time.sleep(60)")
    with start(before=before, patches=SHORT_GRACE) as child:
        wait_for(Path("asked").exists)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 130
    assert not Path("out.onnx").exists()


@pytest.mark.usefixtures("here")
def test_nothing_but_the_report_is_printed() -> None:
    """HiGHS says which solutions it polishes, although it is told to be silent."""
    metric("os.write(1, b'noise'); print('noise'); os.system('echo noise'); return 1.0")
    done = run("--json", "-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["metric"]["name"] == "odd:f"


@pytest.mark.usefixtures("here")
def test_a_metric_that_ends_the_process() -> None:
    metric("os._exit(0)")
    done = run()
    assert done.returncode == 1
    assert "ended the process too early" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("here")
def test_what_a_metric_leaves_running_keeps_nobody() -> None:
    metric("import threading; threading.Thread(target=time.sleep, args=(90,)).start(); return 1.0")
    started = time.monotonic()
    done = run(timeout=80)
    assert done.returncode == 0
    assert done.stderr == ""
    assert time.monotonic() - started < 60
    assert Path("out.onnx").exists()


def test_a_fork_is_no_part_of_what_is_interrupted() -> None:
    """A signal may come before it has forgotten whose handlers it has."""
    heard = Interrupt()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, heard)
            signal.raise_signal(signal.SIGTERM)
        finally:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM


@pytest.mark.usefixtures("here")
def test_processes_of_a_metric_end_as_any_others_do() -> None:
    metric(
        "import multiprocessing; pool = multiprocessing.get_context('fork').Pool(2); "
        "pool.map(abs, [1, 2]); pool.terminate(); pool.join(); return 1.0"
    )
    done = run()
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


class UnspeakableError(Exception):
    """An error that can't even be said."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_without_words() -> None:
    assert one_line(UnspeakableError()) == "UnspeakableError"


@pytest.mark.usefixtures("here")
def test_what_does_not_hear_is_ended() -> None:
    """Python handles signals between two calls, and a call for linear algebra may take minutes."""
    metric("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); time.sleep(90)")
    with asking(SHORT_GRACE) as child:
        working = int(Path("asked").read_text())
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=40)
        assert child.returncode == 130
        wait_for(lambda: is_over(working))
    assert told == "onnxlr: interrupted; no file was left half-written\n"


def is_over(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("RLIMIT_AS, (500 << 20, 500 << 20)", "limited to 524,288,000 bytes of address space"),
        ("RLIMIT_NOFILE, (32, 32)", "limited to 32 open files"),
    ],
)
def test_limits_that_libraries_die_of(limit: str, words: str) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.{limit});"
        "from onnxlr.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_too_few_threads_for_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.api.arguments.can_start_threads", lambda count: count <= 16)
    model = linear(low_rank(np.random.default_rng(0), 64, 48, 3), rows="n", name="fc")
    assert onnxlr.bench(model, threads=8, seconds=0.01).machine.threads == 8
    with pytest.raises(onnxlr.UsageError, match="--threads 9: this user may not have"):
        onnxlr.bench(model, threads=9, seconds=0.01)


def test_too_few_threads(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begin, left = threading.Thread.start, iter(range(7))

    def start(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert not can_start_threads(8)
    monkeypatch.undo()
    assert can_start_threads(8)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("os.fork", lambda: 1)
    monkeypatch.setattr("os.waitpid", lambda *_: (1, 256))
    with pytest.raises(SystemExit, match="1"):
        check_resource_limits()
    assert capfd.readouterr().err.startswith("onnxlr: this user may not have")


@pytest.mark.usefixtures("here")
def test_what_comes_after_the_end_is_none() -> None:
    """A library crashes as the process ends: OUT is there, and that is what counts."""
    metric("import atexit; atexit.register(os.kill, os.getpid(), signal.SIGSEGV); return 1.0")
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("out.onnx").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("flag", ["--help", "--version", "optimize -h"])
def test_help_that_cannot_be_printed(flag: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = commands.run(*flag.split(), prints_to=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "onnxlr: No space left on device\n"


JOBLIB = "optimize in.onnx out.onnx --rank 4 --max-drop 1 --no-measure"
SCRIPT = "import sys; sys.argv[0] = 'onnxlr'; from onnxlr.__main__ import main; main()"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("environment", "command", "words"),
    [
        (
            {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "nope"},
            "inspect in.onnx",
            "can't be started: Val",
        ),
        ({"_ONNXLR_COMPLETE": "bash_complete"}, "", "KeyError: 'COMP_WORDS'"),
        ({"JOBLIB_START_METHOD": "nope", TRIAL_VARIABLE: "60"}, JOBLIB, "joblib can't be imported"),
    ],
)
def test_what_fails_outside_of_any_command(
    environment: dict[str, str], command: str, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command.split()],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if command == JOBLIB else 1)
    assert done.stderr.startswith(f"onnxlr: {words}")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("shown", [False, True])
def test_warnings_are_for_developers(shown: bool) -> None:
    metric("import warnings; warnings.warn('from a library'); return 0.0")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    environment |= {"PYTHONWARNINGS": "default"} if shown else {}
    command = [*COMMAND, "--no-measure"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert ("from a library" in done.stderr) == shown


@pytest.mark.usefixtures("here")
def test_settings_of_figures_in_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook names a backend in the environment; matplotlib reads settings in the folder."""
    Path("matplotlibrc").write_text("nonsense: 3\nfont.size: large\n")
    monkeypatch.setenv("MPLBACKEND", "module://nobody.has_it")
    done = commands.run(*OPTIMIZE[:3], "--verify", "none", "--quiet", "--report", "r.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "<svg" in Path("r.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["passes", "inspect in.onnx", "--help"])
def test_a_reader_that_goes_away(command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = commands.run(*command.split(), prints_to=writing)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1
