"""How processes of our own are started and ended, through loky."""

import contextlib
import multiprocessing.resource_tracker
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from onnxlr.errors import UsageError, one_line
from onnxlr.system.signals import end_signals_blocked, exit_with_parent

# What says that there are none to be had: no room for files, no semaphores, which some systems let
# nobody have, or this one serves a pool whose processes may have no children.
NO_PROCESS_ERRORS = (OSError, AssertionError, ImportError)
# Of processes that are begun by ``python -m``: modules in the working folder are none of theirs.
WORKER_ENVIRONMENT = {"PYTHONSAFEPATH": "1"}


def import_joblib() -> Any:
    """Imported late: it takes a fifth of a second, and most commands never need it."""
    if sys.stderr is None:  # it flushes what a program without a console hasn't got
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    with warnings.catch_warnings():
        # Where there are no semaphores; ``map`` does without processes then.
        warnings.filterwarnings("ignore", message=".*joblib will operate in serial mode")
        try:
            import joblib
        except ValueError as error:
            raise UsageError(
                f"joblib can't be imported: {one_line(error)}; unset JOBLIB_… and "
                "LOKY_… in the environment"
            ) from None
    return joblib


def import_loky() -> Any:
    """Loky, and trackers under way: they clear away what a killed run leaves, without a word."""
    import_joblib()
    from joblib.externals import loky  # joblib itself does without it where there are no semaphores

    # A process that has grown is replaced by a fresh one: nothing the user should hear of. It is
    # said in a thread of the pool's.
    warnings.filterwarnings("ignore", message="A worker stopped")
    with _ENVIRONMENT:
        _begin_trackers()
    return loky


def _begin_trackers() -> None:
    """In silence, and deaf to what asks to end: they end by themselves, with the last of us."""
    from joblib.externals.loky.backend import resource_tracker

    silent = WORKER_ENVIRONMENT | {"PYTHONWARNINGS": "ignore"}
    given = {k: v for k, v in os.environ.items() if k in silent}
    os.environ.update(silent)
    try:
        with end_signals_blocked(), contextlib.suppress(OSError):  # the pool will say so
            resource_tracker.ensure_running()
            if os.name == "posix":  # each worker is told of that of the standard library too
                multiprocessing.resource_tracker.ensure_running()
    finally:
        for name in silent:
            del os.environ[name]
        os.environ.update(given)


def start_pool(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A pool whose processes were begun deaf to what asks to end: that is for us to answer.

    It is asked of all that a terminal has begun, and before ``follow`` they would print their own.
    """
    with end_signals_blocked():
        executor = make(*args, **options)
        executor.submit(int)  # the first piece begins them, and the thread that begins later ones
    return executor


def forget_pool_after_fork() -> None:
    """After a fork the pool is the parent's, and nobody here would tend it."""
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    if loky is not None:
        loky._executor = None  # type: ignore[attr-defined]


def initialize_worker(parent: int, by_kernel: bool) -> None:
    """End this process when the one that began it is no more, however that ended.

    What it has to say comes back as an error, or is told by its end: it prints nothing.
    """
    with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    exit_with_parent(parent, by_kernel=by_kernel)


def kill_pool(executor: Any) -> None:
    """End a pool of processes now, whatever they do.

    Its own way to do that may trip over a result that comes in at the same time; processes that die
    it knows how to bury.
    """
    for pid in list(executor._processes or ()):
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()
    executor.shutdown(wait=True)


_ENVIRONMENT = threading.RLock()  # is the process's
