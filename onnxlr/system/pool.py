"""A pool that maps a function over items in worker processes, or by a cluster, in order."""

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
    kill_pool,
    start_pool,
)
from onnxlr.system.files import scratch_folder
from onnxlr.system.fork_server import FORK_SERVER
from onnxlr.system.memory import available_memory

T = TypeVar("T")
# Seconds of a processor that it takes until a process works: as a new interpreter, or forked.
_START_SECONDS, _FORK_SECONDS = 2.5, 0.25
POLL_SECONDS = 2.0  # between looks whether a cluster is still there
_PROCESS_BYTES = 250 << 20  # memory that a process takes before it does any work
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Workers(Protocol):
    """Workers on other machines, as a pool uses them.

    Attributes
    ----------
    executor : Executor
        It takes tasks.
    count : int
        Number of workers.
    """

    executor: Executor
    count: int

    def share(self, blob: bytes) -> Any:
        """Send what all tasks have in common; returns an argument that workers get as bytes."""

    def count_sent(self, nbytes: int) -> None:
        """Add to the bytes sent, or refuse to send so many in one piece."""

    def count_received(self, nbytes: int) -> None:
        """Add to the bytes received."""

    def lost(self, error: BaseException | None) -> bool:
        """Whether this error means that the workers are gone; for None, whether they are."""


class Pool:
    """Maps functions over items, in at most a given number of processes.

    Each process does one task at a time with one thread of linear algebra. If the caller limits
    linear algebra to one thread as well (``one_blas_thread``), sums are the same to the bit
    wherever they are computed.

    Parameters
    ----------
    count : int or None
        Number of processes; None for as many as there are cores for.
    threads : int
        Threads that ONNX Runtime takes in each.
    folder : Path, optional
        Where a file with the shared arguments is written.
    workers : Workers, optional
        They compute in place of local processes.

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
        self.notes: list[str] = []  # for the user

    def map(
        self,
        function: Callable[..., T],
        items: Sequence[tuple[Any, ...]],
        *shared: Any,
        needs: int = 0,
    ) -> Iterator[T]:
        """Yield ``function(*shared, *item)`` for every item, in their order.

        The first results are computed in this process, to see how much work they are. No task is
        left running when the iterator ends. Where a process dies or memory runs out, fewer
        processes compute the rest; where the cluster is lost, local ones do.

        Parameters
        ----------
        function : callable
        items : sequence of tuple
        *shared
            Arguments that are the same for all items.
        needs : int
            Bytes of memory that a task takes: no more run at once than there is room for.

        Raises
        ------
        MemoryError
            If there is not enough for one process alone.
        """
        done = 0
        if self.workers is not None and items:
            for result in self._by_workers(function, items, shared, self.workers):
                done += 1
                yield result
        # What other programs take of the processors delays the start as much as the work.
        started, first = time.process_time(), done
        while done < len(items):
            spent, left = time.process_time() - started, len(items) - done
            if done > first and _processes_pay(spent / (done - first), left, self.count):
                yield from self._by_processes(function, items[done:], shared, needs)
                return
            yield function(*shared, *items[done])
            done += 1

    def _by_processes(
        self,
        function: Callable[..., T],
        items: Sequence[tuple[Any, ...]],
        shared: tuple[Any, ...],
        needs: int,
    ) -> Iterator[T]:
        """Compute in local processes: in fewer where one dies, in this one where none can start."""
        room = max(1, available_memory() // (_PROCESS_BYTES + needs))
        width = min(self.count, len(items), room)
        done, failed_at = 0, -1
        while done < len(items):
            try:
                with (
                    self._shared_file(shared) as (file, token),
                    _open_executor(width) as executor,
                ):
                    for result in _in_order(executor, function, items[done:], token, file, width):
                        done += 1
                        yield result
            except (BrokenExecutor, MemoryError) as error:
                if width == 1 and failed_at == done:  # alone, and no further than before
                    raise MemoryError(
                        "a process that decomposed ended before its time, most likely for "
                        "want of memory"
                        if isinstance(error, BrokenExecutor)
                        else str(error)
                    ) from None
                width, failed_at = max(1, width // 2), done
            except NO_PROCESS_ERRORS:
                for item in items[done:]:
                    yield function(*shared, *item)
                return

    @contextlib.contextmanager
    def _shared_file(self, shared: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
        """The path of a file with the shared arguments, and a token that identifies them."""
        joblib = import_joblib()
        with scratch_folder(self.folder, "shared-") as folder:
            path = str(folder / "common")
            joblib.dump(shared, path)
            yield path, uuid.uuid4().hex

    def _by_workers(
        self,
        function: Callable[..., T],
        items: Sequence[tuple[Any, ...]],
        shared: tuple[Any, ...],
        workers: Workers,
    ) -> Iterator[T]:
        """Compute by the cluster's workers, as many items as are done before they are lost."""
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


def _processes_pay(seconds: float, left: int, count: int) -> bool:
    """Whether processes save more than their start takes, for items of so many seconds each."""
    saved = seconds * left * (1 - 1 / min(count, left))
    start = _START_SECONDS if FORK_SERVER.pid is None else min(_FORK_SECONDS, _START_SECONDS)
    return saved > start


@contextlib.contextmanager
def _open_executor(width: int) -> Iterator[Executor]:
    """An executor of so many processes; they are killed if the work is abandoned."""
    make = import_loky().get_reusable_executor
    from onnxlr.system.warm_workers import worker_options  # of classes that loky has

    environment = _ONE_THREAD | WORKER_ENVIRONMENT
    executor = start_pool(make, width, env=environment, **worker_options())
    try:
        yield executor
    except Exception:
        raise  # tasks that were running have been waited for
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
    shared: Any,
    width: int,
    workers: Workers | None = None,
) -> Iterator[T]:
    """Yield results in the order of the items, with one task more submitted than ``width``."""
    queue = iter(items)
    pending: deque[Future[bytes]] = deque()

    def submit(count: int) -> None:
        for item in itertools.islice(queue, count):
            task = pickle.dumps((function, item), protocol=5)
            if workers is not None:
                workers.count_sent(len(task))
            pending.append(executor.submit(_run_task, token, shared, task))

    try:
        submit(width + 1)
        while pending:
            result = _wait_for(pending[0], workers)
            pending.popleft()
            submit(1)
            yield pickle.loads(result)  # noqa: S301 - made by ``_run_task`` of this very run
    finally:
        running = [future for future in pending if not future.cancel()]
        if workers is None and isinstance(sys.exception(), Exception):
            wait(running)


def _wait_for(future: "Future[bytes]", workers: Workers | None) -> bytes:
    """A task's result; raises CancelledError where its workers are lost meanwhile."""
    while True:
        try:
            result = future.result(None if workers is None else POLL_SECONDS)
        except TimeoutError:
            if workers is None:
                raise
            if future.done():  # it has just finished, or the task itself raised TimeoutError
                result = future.result()
            elif workers.lost(None):
                raise CancelledError from None
            else:
                continue
        if workers is not None:
            workers.count_received(len(result))
        return result


_TASK_LOCK = threading.Lock()  # a worker of a cluster may have several threads
_SHARED: dict[str, tuple[Any, ...]] = {}  # by token: the shared arguments of the current map


def _run_task(token: str, shared: str | bytes, task: bytes) -> bytes:
    """Compute one item in the process where this is called; returns the pickled result."""
    with _TASK_LOCK, one_blas_thread():
        if token not in _SHARED:
            _SHARED.clear()
            _SHARED[token] = _load_shared(shared)
        function, item = pickle.loads(task)  # noqa: S301 - made by ``_in_order`` of the same run
        return pickle.dumps(function(*_SHARED[token], *item), protocol=5)


def _load_shared(shared: str | bytes) -> tuple[Any, ...]:
    """The shared arguments; arrays in a file are mapped, so that processes share their memory."""
    if isinstance(shared, bytes):
        args = pickle.loads(shared)  # noqa: S301 - made by ``_by_workers`` of the same run
    else:
        args = import_joblib().load(shared, mmap_mode="r")
    assert isinstance(args, tuple)
    return args


def usable_cores() -> int:
    """Number of cores that this process may use, as far as the system says; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
