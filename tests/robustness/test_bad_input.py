"""What the command refuses: one line, the right exit code, and every file as it was before."""

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from onnxlr.api import functions
from onnxlr.cli.commands import main
from onnxlr.errors import RuntimeMissingError
from onnxlr.system.session import Machine, Session
from tests.support import commands
from tests.support.bad_input_cases import CASES, OPTIMIZE, WITH_EARLIER_OUTPUT, Case
from tests.support.bad_input_files import Array, external, network, sample, save, weight
from tests.support.builders import low_rank

Tree = dict[str, bytes | str]
_MAIN = "from onnxlr.cli.commands import main; main()"
_NO_DEFECT = ("internal error", "Traceback", "Error calling", "In clone_graph")


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plan for the network, that replaces fc1 with rank 4."""
    result = functions.optimize(network(), rank=4, include="fc1", verify="none")
    assert [(d.name, d.rank) for d in result.plan.replaced] == [("fc1", (4,))]
    folder = tmp_path_factory.mktemp("plan")
    path = folder / "in.onnx"
    path.write_bytes(network().SerializeToString())
    return functions.optimize(path, rank=4, include="fc1", verify="none").plan.to_json()


@pytest.fixture
def place(tmp_path: Path, plan_text: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to stand in, with a good model, good data, a good plan and an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save(network())
    np.savez("data.npz", x=sample(6, 32), label=np.arange(6) % 3)
    Path("plan.json").write_text(plan_text, encoding="utf-8")
    Path("folder").mkdir()
    modules = set(sys.modules)
    yield here
    for name in set(sys.modules) - modules:
        if name.startswith("bad_"):
            del sys.modules[name]


def _tree(folder: Path) -> Tree:
    """Everything that lies in a folder: contents of files, kinds of the rest."""
    return {
        str(path.relative_to(folder)): (
            f"link to {path.readlink()}"
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else "folder"
            if path.is_dir()
            else "other"
        )
        for path in folder.rglob("*")
    }


def _run(command: list[str]) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def _the_line(stderr: str) -> str:
    """The one line of a message; click's errors come below the usage."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    if lines and lines[0].startswith("Usage: "):
        lines = [line for line in lines if line.startswith("Error: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def _check_refusal(
    code: int, stdout: str, stderr: str, expected: int, words: tuple[str, ...]
) -> None:
    line = _the_line(stderr)
    assert line.startswith(("onnxlr: ", "Error: "))
    assert not [word for word in _NO_DEFECT if word in line], line
    assert not [word for word in words if word not in line], line
    assert code == expected, line
    assert stdout == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_makes_no_sense_is_refused_in_a_line(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONNXLR_TRACEBACK", raising=False)
    case.setup()
    before = _tree(place)
    # A model that is a pipe has no writer: reading it would wait for ever.
    with _deadline(8):
        code, stdout, stderr = _run(case.command.split(" "))
    assert _tree(place) == before
    _check_refusal(code, stdout, stderr, case.code, case.words)


@pytest.mark.parametrize("case", WITH_EARLIER_OUTPUT, ids=lambda case: case.name)
def test_a_refusal_leaves_an_earlier_output_alone(case: Case, place: Path) -> None:
    case.setup()
    Path("out.onnx").write_bytes(b"of an earlier run")
    before = _tree(place)
    code, stdout, stderr = _run(case.command.split(" "))
    assert _tree(place) == before
    _check_refusal(code, stdout, stderr, case.code, case.words)


@contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    """Fail the test if the block takes longer than this."""

    def late(*_: object) -> None:
        pytest.fail(f"hangs for more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.mark.parametrize(
    "command",
    [OPTIMIZE, "bench in.onnx", "compare in.onnx in.onnx"],
    ids=["optimize", "bench", "compare"],
)
def test_a_provider_that_is_not_there(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    before = _tree(place)
    result = _run([*command.split(" "), "--provider", "cuda"])
    assert _tree(place) == before
    _check_refusal(*result, 1, ("CUDAExecutionProvider", "pip install 'onnxlr[cuda]'"))


def test_a_provider_that_falls_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that promises CUDA and then runs on the CPU, as one without cuDNN does."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    opened = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, **_: opened(model, options, providers=["CPUExecutionProvider"]),
    )
    words = "fell back from CUDAExecutionProvider to CPUExecutionProvider.*--provider cpu"
    with pytest.raises(RuntimeMissingError, match=words):  # as the child process meets it
        Session(place / "in.onnx", Machine("cuda"))


@pytest.mark.parametrize(
    "command",
    [OPTIMIZE, "bench in.onnx", "compare in.onnx in.onnx"],
    ids=["optimize", "bench", "compare"],
)
def test_without_onnxruntime(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    before = _tree(place)
    result = _run(command.split(" "))
    assert _tree(place) == before
    _check_refusal(*result, 1, ("ONNX Runtime", "pip install 'onnxlr[cpu]'"))


def test_without_onnxruntime_the_command_starts_and_inspects(place: Path) -> None:
    """In a new process: nothing may import the runtime on the way in."""
    block = "import sys; sys.modules['onnxruntime'] = None; "
    result = _child(block + _MAIN, "inspect in.onnx --quiet")
    assert (result.returncode, result.stderr) == (0, "")
    result = _child(block + _MAIN, OPTIMIZE)
    _check_refusal(result.returncode, result.stdout, result.stderr, 1, ("onnxlr[cpu]",))
    assert ".onnxlr" not in "".join(_tree(place))


def _child(code: str, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", code, *command.split(" ")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "options",
    ["--rank 4 --include fc1 --max-drop 1", "--include nothing --verify none"],
    ids=["rewritten", "copied"],
)
@pytest.mark.parametrize("earlier", [None, b"of an earlier run"], ids=["new", "existing"])
def test_the_disk_is_full_half_way(options: str, earlier: bytes | None, place: Path) -> None:
    save(network(width=256, classes=128))
    if earlier is not None:
        Path("out.onnx").write_bytes(earlier)
    before = _tree(place)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))
    command = f"{OPTIMIZE} {options}"
    result = commands.run(*command.split(), before=limit, entry=commands.UNWATCHED)
    assert _tree(place) == before
    _check_refusal(
        result.returncode, result.stdout, result.stderr, 1, ("out.onnx", "full", "free some space")
    )


def test_interrupted_half_way(place: Path) -> None:
    """A metric that sleeps holds the run where the temporary folder exists."""
    Path("bad_slow.py").write_text(
        "import pathlib, time\n"
        "def f(session):\n"
        "    pathlib.Path('folder/asked').touch()\n"
        "    time.sleep(60)\n",
        encoding="utf-8",
    )
    Path("folder/asked").touch()
    before = _tree(place)
    Path("folder/asked").unlink()
    command = f"{OPTIMIZE} --rank 4 --metric bad_slow:f"
    with commands.start(*command.split(), entry=commands.UNWATCHED) as child:
        limit = time.monotonic() + 40
        while not Path("folder/asked").exists():
            assert time.monotonic() < limit, "the metric was never asked"
            time.sleep(0.02)
        assert list(place.glob(".onnxlr-*"))
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(20)
        code = child.wait(20)
    assert _tree(place) == before
    _check_refusal(code, stdout, stderr, 130, ("interrupted", "half-written"))


@pytest.mark.usefixtures("place")
def test_a_foreign_weight_file_beside_the_output_survives() -> None:
    """IN keeps its weights in in.data; beside OUT lies a file of that name, of someone else."""
    external()()
    foreign, before = Path("folder/in.data"), Path("in.data").stat()
    foreign.write_bytes(b"precious")
    copy = ["optimize", "--include", "nothing", "--verify", "none", "in.onnx"]
    _run([*copy, "folder/out.onnx"])
    assert foreign.read_bytes() == b"precious"
    if Path("folder/out.onnx").exists():
        _outputs("folder/out.onnx")
    _run([*copy, "out.onnx"])
    assert Path("in.data").stat().st_ino == before.st_ino  # IN is never touched, not even by equals
    assert Path("in.data").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("include", ["fc1", "fc2", "nothing"])
def test_external_weights_go_with_the_output(include: str) -> None:
    """Whichever weights are replaced, OUT is complete in another folder."""
    model = weight("w2", low_rank(np.random.default_rng(3), 32, 8, 1))
    onnx.save(model, "in.onnx", save_as_external_data=True, location="in.data", size_threshold=16)
    expected = _outputs("in.onnx")
    command = f"optimize in.onnx folder/out.onnx --rank exact --include {include} --verify none"
    code, _, stderr = _run([*command.split(" "), "--quiet"])
    assert (code, stderr) == (0, "")
    Path("in.data").unlink()
    np.testing.assert_allclose(_outputs("folder/out.onnx"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("place")
def test_a_model_behind_symbolic_links() -> None:
    """A hub's cache stores names in one folder and contents in another."""
    onnx.save(network(), "folder/a", save_as_external_data=True, location="b", size_threshold=16)
    model = onnx.load("folder/a", load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "in.data"
    Path("folder/a").write_bytes(model.SerializeToString())
    Path("in.onnx").unlink()
    Path("in.onnx").symlink_to("folder/a")
    Path("in.data").symlink_to("folder/b")
    code, stdout, stderr = _run(["inspect", "in.onnx", "--quiet"])
    if code:
        _check_refusal(code, stdout, stderr, 1, ("in.data", "link"))


def _outputs(path: str) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": sample(6, 32)})[0])
