"""Running one hostile case: the commands, what they end with, and what OUT is worth."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

import onnxlr
from models.fuzz.cases import COMMANDS, IN, OUT, Case, Sound
from onnxlr.api import functions
from onnxlr.cli.commands import main as onnxlr_command
from onnxlr.errors import OnnxlrError
from onnxlr.limits import Limits
from onnxlr.model.load import load
from onnxlr.prepare.synthetic import find_runnable_shapes, synthetic_feed
from onnxlr.system import sandbox
from onnxlr.system.session import ONE_CPU_THREAD
from onnxlr.system.trial import Trial
from onnxlr.verify.latency_file import describe
from tests.support.hostile_seeds import mlp

_MOST_MEMORY = 2 << 30  # of resident memory at any time
_DATA = re.compile(r"weights-[0-9a-f]{16}\.data")
_WRITTEN = (OUT, "p.json", "c.json", "b.json")
_LIMIT = 0.05  # how far an OUT of --max-drop 0.01 may be from IN; its samples were others


@dataclass(frozen=True)
class Verdict:
    """The end of a case: passed, refused or find; of a find also its place and its message."""

    word: str
    place: str = ""
    words: str = ""


class _FindError(Exception):
    def __init__(self, place: str, words: str = "") -> None:
        self.verdict = Verdict("find", place, words)


def lay_out(case: Case, folder: Path) -> None:
    """Write a case's files."""
    for name, data in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name, target in case.links.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target)


def run_case(
    case: Case, folder: Path, tell: Callable[[str], None], *, keep: bool = False
) -> Verdict:
    """Run a case's commands in its folder, and judge what they leave."""
    _hurry()
    refused, words = 0, []
    try:
        with _standing(folder, cache=case.cache):
            for name in case.commands:
                if name == "apply" and not Path("p.json").exists():
                    continue
                tell(name)
                line = _command(name, case)
                refused += line is not None
                words.append(f"{name}: {line or 'written'}")
                if Path(OUT).exists() and line is None:
                    _judge(name, words, tell)
                if not keep:
                    Path(OUT).unlink(missing_ok=True)
    except _FindError as find:
        return find.verdict
    return Verdict("refused" if refused else "passed", "", "\n".join(words))


@contextlib.contextmanager
def _standing(folder: Path, *, cache: bool) -> Iterator[None]:
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ["ONNXLR_CACHE"] = str(Path.cwd() / "cache") if cache else "off"
    os.environ["ONNXLR_TRACEBACK"] = "1"
    os.environ.setdefault("ONNXLR_TRIAL", "5")  # what hangs shows it as well in five seconds
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def _command(name: str, case: Case) -> str | None:
    """Run one command, and return the line it was refused with, or None if it went well."""
    before, said = _tree(case), io.StringIO()
    _forget_peak()
    code, trace = 0, ""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        try:
            onnxlr_command(list(COMMANDS[name]), prog_name="onnxlr")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            code, trace = -1, _place(error)
            text = f"{type(error).__name__}: {error}"
    if trace:
        raise _FindError(f"{name}: {trace}", text)
    line = said.getvalue().strip()
    after = _tree(case)
    if Path("unpickled").exists():
        raise _FindError(f"{name}: a pickle was loaded", line)
    changed = [n for n in before if n not in _WRITTEN and before[n] != after.get(n)]
    new = [n for n in after if n not in before and n not in _WRITTEN]
    changed += [n for n in new if code or not _DATA.fullmatch(n)]  # external data of OUT
    if code and Path(OUT).exists():
        changed.append(f"{OUT} in spite of {line}")
    if changed:
        raise _FindError(f"{name}: files changed or left behind", f"{changed[:5]}: {line}")
    peak = _peak()
    if peak > _MOST_MEMORY or "out of memory" in line:
        raise _FindError(f"{name}: memory", f"{peak >> 20} MB: {line}")
    if code not in (0, 1, 2, 3) or (code and not _is_a_line(line)):
        raise _FindError(f"{name}: exit code {code}, no line", line)
    return line if code else None


def _is_a_line(said: str) -> bool:
    lines = said.splitlines()
    defect = ("internal error", "Traceback")
    return (
        len(lines) == 1
        and lines[0].startswith("onnxlr: ")
        and not any(d in lines[0] for d in defect)
        and len(lines[0]) < 2000
        and lines[0].isprintable()
    )


def _place(error: BaseException) -> str:
    """Return where an exception comes from: its innermost line in onnxlr, and its type."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([f for f in frames if "/onnxlr" in f.filename] or list(frames))[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno} ({last.line})"


def shorten(text: str) -> str:
    """Return the first line that a crash printed, without what differs from run to run."""
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"0x[0-9a-f]+|\d{4,}", "…", lines[0] if lines else "")[:200]


def _tree(case: Case) -> dict[str, bytes]:
    skipped = ("cache", "table.json") if case.cache or "table" in case.commands else ()
    return {
        str(p): str(p.readlink()).encode() if p.is_symlink() else p.read_bytes()
        for p in Path().rglob("*")
        if (p.is_file() or p.is_symlink()) and not str(p).startswith(skipped or ("\0",))
    }


def _judge(name: str, words: list[str], tell: Callable[[str], None]) -> None:
    """Compare OUT to IN by the checker, the runtime and the outputs."""
    if name not in COMMANDS or COMMANDS[name][0] not in ("optimize", "apply"):
        return
    if Path(OUT).read_bytes() == Path(IN).read_bytes():
        return
    tell("oracle: IN in the checker")
    if _checks(IN) is None:
        tell(f"{name}: OUT in the checker")
        if (why := _checks(OUT)) is not None:
            raise _FindError(f"{name}: OUT fails the checker", why)
    tell("oracle: IN in the runtime")
    if (feed := _feed()) is None or (before := _outputs(IN, feed)) is None:
        return
    tell(f"{name}: OUT in the runtime")
    after = _outputs(OUT, feed)
    if after is None:
        raise _FindError(f"{name}: OUT doesn't run where IN does", "; ".join(words))
    for y, z in zip(before, after, strict=True):
        if y.shape != z.shape or y.dtype != z.dtype:
            raise _FindError(f"{name}: outputs of another shape", f"{y.shape} {z.shape}")
        if y.dtype.kind != "f":
            continue
        finite = np.isfinite(y)
        if not np.array_equal(finite, np.isfinite(z)):
            raise _FindError(f"{name}: outputs no longer finite", f"{finite.sum()} of {y.size}")


def _checks(path: str) -> str | None:
    try:
        onnx.checker.check_model(path)
    except Exception as error:
        return str(error)
    return None


def _feed() -> dict[str, NDArray[Any]] | None:
    """Return inputs that IN runs on in a moment, or None if there are none."""
    try:
        source = load(IN)
        with Trial(Path(IN), ONE_CPU_THREAD, IN, source.nbytes) as tried:
            shapes, level = find_runnable_shapes(source.model, tried, {}, 1, 0)
    except OnnxlrError:
        return None
    return synthetic_feed(source.model, shapes, np.random.default_rng(0), level)


def _outputs(path: str, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]] | None:
    """Return the outputs that are tensors, from a plain session, or None if it doesn't run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return [v for v in session.run(None, feed) if isinstance(v, np.ndarray)]
    except Exception:
        return None


def one_run(path: Path) -> None:
    """Open a model and run it once, on any inputs that it takes."""
    os.chdir(path.parent)
    if (feed := _feed()) is not None:
        _outputs(IN, feed)


class _Forked:
    """Stands in for the pool of child processes: a fork for each call, with all modules loaded."""

    def __init__(self) -> None:
        self._processes: dict[int, object] = {}

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Do what the method of an executor does."""
        answers, answered = os.pipe()
        pid = os.fork()
        if pid == 0:
            with os.fdopen(answered, "wb") as pipe:
                try:
                    said: tuple[bool, Any] = (True, function(*args))
                except Exception as error:
                    said = (False, error)
                pickle.dump(said, pipe)
            os._exit(0)
        os.close(answered)
        self._processes = {pid: None}
        answer: Future[Any] = Future()
        threading.Thread(target=_listen, args=(pid, answers, answer), daemon=True).start()
        return answer

    def shutdown(self, *, wait: bool) -> None:
        """Do what the method of an executor does."""
        assert wait
        self._processes = {}


def _listen(pid: int, answers: int, answer: Future[Any]) -> None:
    """Give a future what its fork says, or that it went down."""
    with os.fdopen(answers, "rb") as pipe:
        content = pipe.read()
    os.waitpid(pid, 0)
    try:
        well, value = pickle.loads(content)  # noqa: S301 - of the fork
    except Exception:  # it was killed before it had said all, or anything
        answer.set_exception(BrokenExecutor())
        return
    if well:
        answer.set_result(value)
    else:
        answer.set_exception(value)


def fork_trials() -> None:
    """Let trials start faster, in a process that ends soon."""
    sandbox._start_executor = _Forked


def _hurry() -> None:
    """Make onnxlr measure as briefly as possible, since speed doesn't matter here."""
    functions.LIMITS = Limits(timing_seconds=0.01, layer_seconds=0.005, ranks=3, bolder_levels=1)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def sound_files() -> Sound:
    """Return a plan, a latency table and cache entries of real runs on the first seed model."""
    _hurry()
    rng = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as name, _standing(Path(name), cache=True):
        onnx.save(mlp(), IN)
        np.savez("data.npz", x=rng.standard_normal((12, 24)).astype(np.float32))
        plan = onnxlr.optimize(IN, OUT, rank=4, verify="none", jobs=1).plan.to_json()
        onnxlr.optimize(IN, OUT, data="data.npz", jobs=1, latency_table="table.json")
        cache = {p.name: p.read_bytes() for p in Path("cache").glob("*")}
        table = Path("table.json").read_bytes()
    click.echo(f"sound files: {len(cache)} cache entries, on {describe(ONE_CPU_THREAD)}")
    return Sound(plan.encode(), table, cache)
