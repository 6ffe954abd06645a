"""What may bring a process down is done in one that may go down: the runtime on untried models."""

import contextlib
import itertools
import multiprocessing.util
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from onnxlr.errors import CrashError, ModelError
from onnxlr.system.children import (
    NO_PROCESS_ERRORS,
    WORKER_ENVIRONMENT,
    import_loky,
    initialize_worker,
    kill_pool,
    start_pool,
)
from onnxlr.system.deadline import SMALL_MODEL_SECONDS, TRIAL_VARIABLE, Deadline, trial_seconds
from onnxlr.system.memory import address_space_used, available_memory
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.system.signals import is_command_process

T = TypeVar("T")

_LEAST_MEMORY = 2 << 30
_USUAL_MEMORY = 4 << 30
_TIMES_ITS_SIZE = 100  # a large model may hold much more than its weights, a small one need not


class _DownError(CrashError):
    """The child process went down; what it did may still be tried again."""


class _TimeoutError(Exception):
    """What was waited for didn't come."""


class _SandboxProcess:
    """One process that stays for the next piece of work, and is replaced where it went down."""

    def __init__(self) -> None:
        self._executor: Any = None
        self._lock = threading.Lock()

    def run(self, function: Callable[..., T], *args: Any, deadline: Deadline, task: str) -> T:
        """See ``run_in_sandbox``."""
        with self._lock:
            try:
                future = self._submit(function, args)
            except NO_PROCESS_ERRORS:  # it is done here then
                self._executor = None
                return function(*args)
            try:
                if not deadline.wait(lambda seconds: bool(wait([future], seconds).done)):
                    raise _TimeoutError
                found: T = future.result()
            except BrokenExecutor:
                self.end()
                raise _DownError(
                    f"{task} crashes ONNX Runtime: the model is broken, or asks for too much"
                ) from None
            except _TimeoutError:
                self.end()
                raise CrashError(
                    f"{task} takes more than {deadline.seconds:.0f} s in ONNX Runtime"
                ) from None
            except BaseException as error:
                if not isinstance(error, Exception):  # Ctrl-C: it must not go on by itself
                    self.end()
                raise
        return found

    def _submit(self, function: Callable[..., T], args: tuple[Any, ...]) -> Any:
        if self._executor is None:
            self._start()
        try:
            return self._executor.submit(function, *args)
        except BrokenExecutor:  # it went down while nothing was asked of it
            self.end()
            self._start()
            return self._executor.submit(function, *args)

    def _start(self) -> None:
        self._executor = _start_executor()
        # Before this process waits for its children: also in one that was forked, where nothing
        # that was registered at its parent's exit counts.
        multiprocessing.util.Finalize(None, self.end, exitpriority=100)

    def forget(self) -> None:
        """After a fork the process is the parent's."""
        self._executor, self._lock = None, threading.Lock()

    def end(self) -> None:
        """Stop the process, whatever it does."""
        if self._executor is not None:
            executor, self._executor = self._executor, None
            kill_pool(executor)


def _start_executor() -> Any:
    """One process, that ends when this one does."""
    loky = import_loky()
    context = loky.backend.context.get_context("loky")
    return start_pool(
        loky.process_executor.ProcessPoolExecutor,
        1,
        context=context,
        env=WORKER_ENVIRONMENT,
        initializer=initialize_worker,
        initargs=(os.getpid(), is_command_process()),
    )


_SANDBOX = _SandboxProcess()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SANDBOX.forget)


def run_in_sandbox(
    function: Callable[..., T], *args: Any, deadline: Deadline | None = None, task: str
) -> T:
    """What a function gives, called in another process.

    Parameters
    ----------
    function : callable
        Of a module, as are its arguments' classes: both are sent.
    *args
    deadline : Deadline, optional
        After which it is stopped.
    task : str
        What is being done, for the message.

    Raises
    ------
    CrashError
        If the process goes down or has to be stopped.
    """
    return _SANDBOX.run(
        function, *args, deadline=deadline or Deadline(SMALL_MODEL_SECONDS), task=task
    )


_numbers = itertools.count()


class Trial:
    """A model that is opened and run in the child process, before it is here.

    A broken or hostile model may crash ONNX Runtime, run for ever or ask for all memory there is.
    With ``off`` in the environment's ``ONNXLR_TRIAL`` every run is taken to go well;
    ``ONNXLR_TRIAL=600`` gives it 600 seconds for all that is tried.

    Parameters
    ----------
    model : path or bytes
    machine : Machine
    label : str
    nbytes : int
        Of the model: what it is given in time and memory goes by it.

    Raises
    ------
    UsageError
        If ``ONNXLR_TRIAL`` is neither ``off`` nor a number of seconds.
    """

    def __init__(self, model: Path | bytes, machine: Machine, label: str, nbytes: int) -> None:
        self._number = next(_numbers)
        # The child process may have been started in another folder.
        whole = model if isinstance(model, bytes) else str(model.absolute())
        memory = _allowance(nbytes) if machine.provider == "cpu" else None  # GPUs map more
        self._given = whole, machine, label, memory
        self._label = label
        seconds = trial_seconds(nbytes)
        self._waiting = None if seconds is None else Deadline(seconds)
        self._ended: CrashError | None = None

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        """Give its memory back."""
        if self._ended is None and self._waiting is not None:
            with contextlib.suppress(CrashError):  # what went down holds nothing any more
                run_in_sandbox(_forget, task=f"closing {self._label}")

    def open(self) -> None:
        """Open it.

        Raises
        ------
        CrashError
            If the runtime goes down or takes too long.
        ModelError
            If the runtime refuses it.
        """
        self._try(f"opening {self._label}", None)

    def run(self, feed: Feed) -> None:
        """Run it, opened if it isn't yet.

        Raises
        ------
        CrashError
            If the runtime goes down; or takes too long, and from then on always.
        ModelError
            If the runtime refuses the model or the feed.
        """
        self._try(f"running {self._label}", dict(feed))

    def _try(self, task: str, feed: Feed | None) -> None:
        if self._waiting is None:
            return
        if self._ended is not None:
            raise self._ended
        try:
            run_in_sandbox(_try, self._number, self._given, feed, deadline=self._waiting, task=task)
        except _DownError:
            raise
        except CrashError:  # too late, told from here or from there
            self._ended = CrashError(
                f"{task} in ONNX Runtime takes more than {self._waiting.seconds:.0f} s: give "
                "smaller sizes with --shape, or more seconds with the environment's "
                f"{TRIAL_VARIABLE}=600; --verify none runs nothing"
            )
            raise self._ended from None
        except ModelError as refusal:
            short = any(word in str(refusal).lower() for word in ("alloc", "memory"))
            memory = self._given[3]
            if not short or memory is None:
                raise
            raise ModelError(
                f"{refusal}; it had {memory / 1e9:.1f} GB of memory; {TRIAL_VARIABLE}=off in the "
                "environment tries and limits nothing"
            ) from None
        finally:
            self._waiting.left = max(1.0, self._waiting.left)


def trials_enabled() -> bool:
    """Whether what nobody vouches for is tried in the child process first."""
    return os.environ.get(TRIAL_VARIABLE) != "off"


def _allowance(nbytes: int) -> int:
    """Bytes of address space that a model of this size may take."""
    for_runs = min(available_memory() // 4 * 3, _USUAL_MEMORY + _TIMES_ITS_SIZE * nbytes)
    return max(_LEAST_MEMORY, for_runs) + 3 * nbytes  # files that are mapped count as well


_OPEN: dict[int, Session] = {}  # in the child: the model at hand


def _try(
    number: int, given: tuple[str | bytes, Machine, str, int | None], feed: Feed | None
) -> None:
    model, machine, label, memory = given
    with _bounded(memory):
        if number not in _OPEN:
            _OPEN.clear()
            _OPEN[number] = Session(model, machine, label)
        if feed is not None:
            _OPEN[number].run(feed)


def _forget() -> None:
    _OPEN.clear()


@contextlib.contextmanager
def _bounded(memory: int | None) -> Iterator[None]:
    """Keeps what a model asks for within so much: a limit ends it, not the system."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        memory = None
    own = address_space_used()
    if memory is None or own is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = own + memory
    least = min(x for x in (room, soft, hard) if x != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
