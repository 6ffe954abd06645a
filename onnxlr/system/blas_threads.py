"""Linear algebra on one thread, for as long as any thread of this process asks for it."""

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
    """Limit linear algebra to one thread within the context.

    Sums then come out the same everywhere, and small products aren't passed between threads. The
    limit holds for the whole process. Of several threads that ask for it at once, the first sets
    it, and the last restores the previous one.
    """
    global _users, _limits
    with _LOCK:
        if _users == 0:
            _clear_controlling_thread()
            _limits = threadpool_limits(1)
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if _users == 0 and _limits is not None:
                _clear_controlling_thread()
                _limits.restore_original_limits()
                _clear_controlling_thread()


def _clear_controlling_thread() -> None:
    """Let this thread set limits: newer threadpoolctl obeys only the thread that set one first."""
    openblas = getattr(threadpoolctl, "OpenBLASController", None)
    if (clear := getattr(openblas, "clear_controlling_thread", None)) is not None:
        clear(force=True)
