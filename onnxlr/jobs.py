"""Independent pieces of work in parallel processes, each with one thread for linear algebra."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# Starting processes takes about this long; what is done sooner is done here.
_WORTHWHILE = 3.0


class Jobs:
    """Maps functions over items, in as many processes as are allowed.

    A process has one thread of linear algebra, so that cores aren't asked for twice; with one here
    as well, which is the caller's to see to, sums are the same to the bit however many there are.

    Parameters
    ----------
    count : int or None
        None for as many as there are cores for.
    threads : int
        That ONNX Runtime takes in each.

    Examples
    --------
    >>> list(Jobs(1).map(abs, [(-1,), (2,)]))
    [1, 2]
    """

    def __init__(self, count: int | None, threads: int = 1) -> None:
        self.count = count or max(1, usable_cores() // threads)

    def map(self, function: Callable[..., T], items: Sequence[tuple[Any, ...]]) -> Iterator[T]:
        """Results in the order of the items; the first are made here, to see how long they take.

        All of them are there before the iterator ends: nothing runs on beside what comes next.

        Raises
        ------
        MemoryError
            If a process was killed for want of memory.
        """
        started = time.perf_counter()
        for done, item in enumerate(items):
            spent = time.perf_counter() - started
            left = spent / done * (len(items) - done) if done else 0.0
            if self.count > 1 and len(items) - done > 1 and left > _WORTHWHILE:
                yield from self._apart(function, items[done:])
                return
            yield function(*item)

    def _apart(self, function: Callable[..., T], items: Sequence[tuple[Any, ...]]) -> Iterator[T]:
        # Imported here: it takes a fifth of a second, and most commands never need it.
        from joblib import Parallel, delayed, parallel_config
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        with parallel_config("loky", inner_max_num_threads=1), warnings.catch_warnings():
            # A process that has grown is replaced by a fresh one: nothing the user should hear of.
            warnings.filterwarnings("ignore", message="A worker stopped")
            workers = Parallel(n_jobs=min(self.count, len(items)), return_as="generator")
            try:
                yield from workers(delayed(function)(*item) for item in items)
            except TerminatedWorkerError as error:
                raise MemoryError(str(error)) from None


def usable_cores() -> int:
    """Cores that this process may use, where the system tells; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
