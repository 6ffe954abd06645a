"""What may bring a process down is done in one that may go down: the runtime on untried models."""

import atexit
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil

from onnxlr.errors import ModelError
from onnxlr.jobs import end, follow, joblib_late
from onnxlr.memory import available
from onnxlr.runtime import Feed, Machine, Session

T = TypeVar("T")

LONGEST = 50.0  # seconds for opening and running what is small
_SECONDS_A_GB = 40.0  # more for what has to be read first


class CrashError(ModelError):
    """What was done in the child process brought it down, or didn't come to an end."""


class _Child:
    """One process that stays for the next piece of work, and is replaced where it went down."""

    def __init__(self) -> None:
        self._executor: Any = None
        self._lock = threading.Lock()

    def run(self, function: Callable[..., T], *args: Any, seconds: float, what: str) -> T:
        """See ``in_child``."""
        with self._lock:
            try:
                if self._executor is None:
                    self._executor = _pool()
                future = self._executor.submit(function, *args)
            except OSError:  # some systems let nobody have semaphores: it is done here then
                self._executor = None
                return function(*args)
            try:
                found: T = future.result(seconds)
            except BrokenExecutor:
                self.end()
                raise CrashError(f"{what}: ONNX Runtime crashed, or was out of memory") from None
            except TimeoutError:
                self.end()
                raise CrashError(
                    f"{what}: it did not end within {seconds:.0f} s; use --verify none, which runs "
                    "nothing"
                ) from None
            except BaseException as error:
                if not isinstance(error, Exception):  # Ctrl-C: it must not go on by itself
                    self.end()
                raise
        return found

    def end(self) -> None:
        """Stop the process, whatever it does."""
        if self._executor is not None:
            executor, self._executor = self._executor, None
            end(executor)


def _pool() -> Any:
    """One process, that ends when this one does."""
    loky = joblib_late().externals.loky
    context = loky.backend.context.get_context("loky")
    return loky.process_executor.ProcessPoolExecutor(
        1, context=context, initializer=follow, initargs=(os.getpid(),)
    )


_CHILD = _Child()
atexit.register(_CHILD.end)


def in_child(function: Callable[..., T], *args: Any, seconds: float = LONGEST, what: str) -> T:
    """What a function gives, called in another process.

    Parameters
    ----------
    function : callable
        Of a module, as are its arguments' classes: both are sent.
    *args
    seconds : float
        After which it is stopped.
    what : str
        What is being done, for the message.

    Raises
    ------
    CrashError
        If the process goes down or has to be stopped.
    """
    return _CHILD.run(function, *args, seconds=seconds, what=what)


_numbers = itertools.count()


class Trial:
    """A model that is opened and run in the child process, before it is here.

    Parameters
    ----------
    model : path or bytes
    machine : Machine
    label : str
    nbytes : int
        Of the model: the larger, the longer it may take.
    folder : str, optional
        Of the external data of a model in bytes.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        machine: Machine,
        label: str,
        nbytes: int,
        folder: str | None = None,
    ) -> None:
        self._number = next(_numbers)
        # The child process may have been started in another folder.
        whole = model if isinstance(model, bytes) else str(Path(model).absolute())
        self._given = whole, machine, label, folder
        self._label = label
        self._left = LONGEST + _SECONDS_A_GB * nbytes / 1e9
        self._ended: CrashError | None = None

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        """Give its memory back."""
        if self._ended is None:
            in_child(_forget, what=f"closing {self._label}")

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
            If the runtime goes down or takes too long; from then on always.
        ModelError
            If the runtime refuses the model or the feed.
        """
        self._try(f"running {self._label}", dict(feed))

    def _try(self, what: str, feed: Feed | None) -> None:
        if self._ended is not None:
            raise self._ended
        started = time.perf_counter()
        try:
            in_child(_try, self._number, self._given, feed, seconds=self._left, what=what)
        except CrashError as crash:
            self._ended = crash
            raise
        finally:
            self._left = max(1.0, self._left - (time.perf_counter() - started))


_OPEN: dict[int, Session] = {}  # in the child: the model at hand


def _try(
    number: int, given: tuple[str | bytes, Machine, str, str | None], feed: Feed | None
) -> None:
    with _bounded(given[1]):
        if number not in _OPEN:
            _OPEN.clear()
            _OPEN[number] = Session(*given)
        if feed is not None:
            _OPEN[number].run(feed)


def _forget() -> None:
    _OPEN.clear()


@contextlib.contextmanager
def _bounded(machine: Machine) -> Iterator[None]:
    """Keeps what a model asks for within the memory there is: a limit ends it, not the system."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if machine.provider == "cpu":  # GPUs map more than there is
        room = int(psutil.Process().memory_info().vms) + available()
        room = room if hard == resource.RLIM_INFINITY else min(room, hard)
        resource.setrlimit(resource.RLIMIT_AS, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
