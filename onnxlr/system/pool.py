"""A pool of processes, or of a cluster's workers: pieces of work side by side, in order."""

import contextlib
import itertools
import os
import pickle
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.system.children import (
    NO_PROCESS_ERRORS,
    WORKER_ENVIRONMENT,
    forget_pool_after_fork,
    import_joblib,
    import_loky,
    initialize_worker,
    kill_pool,
    start_pool,
)
from onnxlr.system.files import scratch_folder
from onnxlr.system.memory import available_memory
from onnxlr.system.signals import is_command_process

T = TypeVar("T")
# Starting processes takes about this long; what is done sooner is done here.
_WORTHWHILE = 3.0
POLL_SECONDS = 2.0  # seconds between looks at whether a cluster is still there
_PROCESS = 250 << 20  # bytes that a process takes before it has done anything
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Workers(Protocol):
    """Workers elsewhere: an executor, and whether it can still be hoped for."""

    executor: Executor
    count: int

    def share(self, blob: bytes) -> Any:
        """Hand over what all pieces have in common; the workers get the bytes for what it gives."""

    def count_sent(self, nbytes: int) -> None:
        """Count what is sent, or refuse to send as much in one piece."""

    def count_received(self, nbytes: int) -> None:
        """Count what came back."""

    def lost(self, error: BaseException | None) -> bool:
        """Whether no worker is left, or this error says so."""


class Pool:
    """Maps functions over items, in as many processes as are allowed.

    A process does one piece at a time with one thread of linear algebra; with one here as well,
    which is the caller's to see to, sums are the same to the bit wherever they are made.

    Parameters
    ----------
    count : int or None
        Processes; None for as many as there are cores for.
    threads : int
        That ONNX Runtime takes in each.
    folder : Path, optional
        Where what the pieces have in common lies meanwhile.
    workers : Workers, optional
        That do it in place of processes here.

    Examples
    --------
    >>> list(Pool(1).map(pow, [(2,), (3,)], 10))
    [100, 1000]
    """

    def __init__(
        self,
        count: int | None,
        threads: int = 1,
        folder: Path | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.count = count or max(1, usable_cores() // threads)
        self.folder = folder
        self.workers = workers
        self.notes: list[str] = []  # what the user should hear of

    def map(
        self,
        function: Callable[..., T],
        items: Sequence[tuple[Any, ...]],
        *shared: Any,
        needs: int = 0,
    ) -> Iterator[T]:
        """``function(*shared, *item)`` for every item, in their order.

        The first are made here, to see how long they take. All results are there before the
        iterator ends: nothing runs on beside what comes next. Where a process dies or memory runs
        out, what isn't done is done by fewer; where workers are lost, here.

        Parameters
        ----------
        function : callable
        items : sequence of tuple
        *shared
            What is the same for all of them.
        needs : int
            Bytes of memory that a piece takes: no more run at once than there is room for.

        Raises
        ------
        MemoryError
            If there is not enough for one process alone.
        """
        done = 0
        if self.workers is not None and items:
            for result in self._elsewhere(function, items, shared, self.workers):
                done += 1
                yield result
        started, first = time.perf_counter(), done
        while done < len(items):
            spent = time.perf_counter() - started
            left = spent / (done - first) * (len(items) - done) if done > first else 0.0
            if self.count > 1 and len(items) - done > 1 and left > _WORTHWHILE:
                yield from self._apart(function, items[done:], shared, needs)
                return
            yield function(*shared, *items[done])
            done += 1

    def _apart(
        self,
        function: Callable[..., T],
        items: Sequence[tuple[Any, ...]],
        shared: tuple[Any, ...],
        needs: int,
    ) -> Iterator[T]:
        """In processes here: fewer where one dies or memory runs out, none where none can start."""
        room = max(1, available_memory() // (_PROCESS + needs))
        width = min(self.count, len(items), room)
        done, failed = 0, -1
        while done < len(items):
            try:
                with self._shared(shared) as (common, token), _processes(width) as executor:
                    for result in _in_order(executor, function, items[done:], token, common, width):
                        done += 1
                        yield result
            except (BrokenExecutor, MemoryError) as error:
                if width == 1 and failed == done:  # alone, and no further than before
                    raise MemoryError(
                        "a process that decomposed ended before its time, most likely for "
                        "want of memory"
                        if isinstance(error, BrokenExecutor)
                        else str(error)
                    ) from None
                width, failed = max(1, width // 2), done
            except NO_PROCESS_ERRORS:
                for item in items[done:]:
                    yield function(*shared, *item)
                return

    @contextlib.contextmanager
    def _shared(self, shared: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
        """A file with what the pieces have in common, and its name among processes."""
        joblib = import_joblib()
        with scratch_folder(self.folder, "shared-") as folder:
            common = str(folder / "common")
            joblib.dump(shared, common)
            yield common, uuid.uuid4().hex

    def _elsewhere(
        self,
        function: Callable[..., T],
        items: Sequence[tuple[Any, ...]],
        shared: tuple[Any, ...],
        workers: Workers,
    ) -> Iterator[T]:
        """By the workers, as far as they last."""
        blob = pickle.dumps(shared, protocol=5)
        try:
            yield from _in_order(
                workers.executor,
                function,
                items,
                uuid.uuid4().hex,
                workers.share(blob),
                2 * workers.count,
                workers,
            )
        except Exception as error:
            if not workers.lost(error):
                raise
            self.workers = None
            self.notes.append("the workers of the cluster were lost: the rest was computed here")


@contextlib.contextmanager
def _processes(width: int) -> Iterator[Executor]:
    """The pool of processes; ended with all that it does where its work ends early."""
    executor = start_pool(
        import_loky().get_reusable_executor,
        width,
        env=_ONE_THREAD | WORKER_ENVIRONMENT,
        initializer=initialize_worker,
        initargs=(os.getpid(), is_command_process()),
    )
    try:
        yield executor
    except Exception:
        raise  # what is under way was seen to its end
    except BaseException:
        kill_pool(executor)
        raise


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_pool_after_fork)


def _in_order(
    executor: Executor,
    function: Callable[..., T],
    items: Sequence[tuple[Any, ...]],
    token: str,
    common: Any,
    width: int,
    workers: Workers | None = None,
) -> Iterator[T]:
    """Results in the order of the items; no more pieces are under way than keep all busy."""
    queue = iter(items)
    waiting: deque[Future[bytes]] = deque()

    def submit(count: int) -> None:
        for item in itertools.islice(queue, count):
            piece = pickle.dumps((function, item), protocol=5)
            if workers is not None:
                workers.count_sent(len(piece))
            waiting.append(executor.submit(_work, token, common, piece))

    try:
        submit(width + 1)
        while waiting:
            found = _result(waiting[0], workers)
            waiting.popleft()
            submit(1)
            yield pickle.loads(found)  # noqa: S301 - made by ``_work`` of this very run
    finally:
        running = [future for future in waiting if not future.cancel()]
        if workers is None and isinstance(sys.exception(), Exception):
            wait(running)


def _result(future: "Future[bytes]", workers: Workers | None) -> bytes:
    while True:
        try:
            found = future.result(None if workers is None else POLL_SECONDS)
        except TimeoutError:
            if workers is None:
                raise
            if future.done():  # just now, or what was done took too long for itself
                found = future.result()
            elif workers.lost(None):
                raise CancelledError from None
            else:
                continue
        if workers is not None:
            workers.count_received(len(found))
        return found


_BUSY = threading.Lock()  # a worker of a cluster may have several threads
_HELD: dict[str, tuple[Any, ...]] = {}  # what the pieces at hand have in common


def _work(token: str, common: str | bytes, piece: bytes) -> bytes:
    """Do one piece of work in the process where this arrives."""
    with _BUSY, one_blas_thread():
        if token not in _HELD:
            _HELD.clear()
            _HELD[token] = _opened(common)
        function, item = pickle.loads(piece)  # noqa: S301 - made by ``_in_order`` of the same run
        return pickle.dumps(function(*_HELD[token], *item), protocol=5)


def _opened(common: str | bytes) -> tuple[Any, ...]:
    """What the pieces have in common; arrays in a file are mapped, not read by every process."""
    if isinstance(common, bytes):
        found = pickle.loads(common)  # noqa: S301 - made by ``_elsewhere`` of the same run
    else:
        found = import_joblib().load(common, mmap_mode="r")
    assert isinstance(found, tuple)
    return found


def usable_cores() -> int:
    """Cores that this process may use, where the system tells; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
