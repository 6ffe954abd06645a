"""Linear algebra on one thread, for as long as anybody in this process needs it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import threadpoolctl
from threadpoolctl import threadpool_limits

_LOCK = threading.Lock()
_users = 0
_limits: threadpool_limits | None = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread of linear algebra: sums come out the same, and small products aren't handed about.

    The limit is the whole process's: of several that ask for it at once, in threads, the first sets
    it, and the last puts back what was there before.
    """
    global _users, _limits
    with _LOCK:
        if _users == 0:
            _take_over()
            _limits = threadpool_limits(1)
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if _users == 0 and _limits is not None:
                _take_over()
                _limits.restore_original_limits()
                _take_over()


def _take_over() -> None:
    """Newer versions of threadpoolctl listen to the thread alone that has set a limit first."""
    openblas = getattr(threadpoolctl, "OpenBLASController", None)
    if (clear := getattr(openblas, "clear_controlling_thread", None)) is not None:
        clear(force=True)
