"""Worker processes: how pools of them are started and stopped, through loky and joblib."""

import contextlib
import multiprocessing.resource_tracker
import os
import sys
import threading
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil

from onnxlr.errors import UsageError, one_line
from onnxlr.system.process import exit_with_parent
from onnxlr.system.signals import end_signals_blocked

# Raised where no processes can be started: there is no room for files, the system has no
# semaphores, or this process is a worker of a pool that allows its workers no children.
NO_PROCESS_ERRORS = (OSError, AssertionError, ImportError)
# For processes that start by ``python -m``: they must not import modules of the working folder.
WORKER_ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
_ENVIRONMENT_LOCK = threading.RLock()  # the environment belongs to the whole process


def import_joblib() -> Any:
    """The joblib module. It takes a fifth of a second to import, and most commands don't need it.

    Raises
    ------
    UsageError
        If joblib refuses what the environment sets for it.
    """
    if sys.stderr is None:  # joblib flushes it, and a program without a console has none
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    with warnings.catch_warnings():
        # Printed where there are no semaphores; ``Pool.map`` then works without processes.
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
    """The loky module, with its resource trackers running.

    The trackers are processes that clear away what a killed run leaves behind.
    """
    import_joblib()
    from joblib.externals import loky  # joblib itself does without it where there are no semaphores

    # A worker that has grown is replaced by a fresh one, which is no news for the user. The
    # warning comes from a thread of the pool.
    warnings.filterwarnings("ignore", message="A worker stopped")
    with _ENVIRONMENT_LOCK:
        _start_trackers()
    return loky


def _start_trackers() -> None:
    """Start the trackers without their output, and with ``END_SIGNALS`` blocked.

    They end by themselves after the last process that uses them.
    """
    from joblib.externals.loky.backend import resource_tracker

    silent = WORKER_ENVIRONMENT | {"PYTHONWARNINGS": "ignore"}
    previous = {k: v for k, v in os.environ.items() if k in silent}
    os.environ.update(silent)
    try:
        with end_signals_blocked(), contextlib.suppress(OSError):  # the pool will report it
            resource_tracker.ensure_running()
            if os.name == "posix":  # each worker uses that of the standard library too
                multiprocessing.resource_tracker.ensure_running()
    finally:
        for name in silent:
            del os.environ[name]
        os.environ.update(previous)


def start_pool(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """An executor made by ``make``, its processes started with ``END_SIGNALS`` blocked.

    A terminal sends them to every process. Only the parent is to answer: before
    ``initialize_worker`` has run, a worker would print a traceback.
    """
    with end_signals_blocked():
        executor = make(*args, **options)
        executor.submit(int)  # the first task starts them, and the thread that starts later ones
    return executor


def forget_pool_after_fork() -> None:
    """Forget loky's shared pool in a forked process: its workers belong to the parent."""
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    if loky is not None:
        loky._executor = None  # type: ignore[attr-defined]


def initialize_worker(parents: Collection[int], by_kernel: bool) -> None:
    """Set up a worker process: it prints nothing, and ends when its parent has ended.

    Its failures reach the parent as exceptions, or by the end of the process.

    Parameters
    ----------
    parents : collection of int
        Process ids of those that may have started it.
    by_kernel : bool
        See ``exit_with_parent``.
    """
    with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    parent = os.getppid()
    if parent not in parents:  # it has ended by now
        os._exit(1)
    exit_with_parent(parent, by_kernel=by_kernel)


def kill_pool(executor: Any) -> None:
    """Kill the worker processes of an executor, whatever they are doing.

    Loky's own way to kill them may fail when a result arrives at the same time; workers that die
    by themselves it handles well.
    """
    for pid in list(executor._processes or ()):
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()
    executor.shutdown(wait=True)
