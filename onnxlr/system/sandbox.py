"""A process for work that may crash: functions run there, so that a crash costs only that process.

It is one child process that stays for the next call, and is replaced when it went down.
"""

import multiprocessing.util
import os
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, wait
from typing import Any, TypeVar

from onnxlr.errors import CrashError
from onnxlr.system.children import (
    NO_PROCESS_ERRORS,
    WORKER_ENVIRONMENT,
    import_loky,
    kill_pool,
    start_pool,
)
from onnxlr.system.deadline import SMALL_MODEL_SECONDS, Deadline

T = TypeVar("T")


class SandboxCrashError(CrashError):
    """The sandbox's process went down; unlike work that is late, it may be tried again."""


class _DeadlineError(Exception):
    """The work wasn't done in time."""


class _Sandbox:
    """The child process, which is started by the first call."""

    def __init__(self) -> None:
        self._executor: Any = None
        self._lock = threading.Lock()

    def run(self, function: Callable[..., T], *args: Any, deadline: Deadline, task: str) -> T:
        """See ``run_in_sandbox``."""
        with self._lock:
            try:
                future = self._submit(function, args)
            except NO_PROCESS_ERRORS:  # without another process, the work is done in this one
                self._executor = None
                return function(*args)
            try:
                if not deadline.wait(lambda seconds: bool(wait([future], seconds).done)):
                    raise _DeadlineError
                result: T = future.result()
            except BrokenExecutor:
                self.kill()
                raise SandboxCrashError(
                    f"{task} crashes ONNX Runtime: the model is broken, or asks for too much"
                ) from None
            except _DeadlineError:
                self.kill()
                raise CrashError(
                    f"{task} takes more than {deadline.seconds:.0f} s in ONNX Runtime"
                ) from None
            except BaseException as error:
                if not isinstance(error, Exception):  # after Ctrl-C it must not go on by itself
                    self.kill()
                raise
        return result

    def _submit(self, function: Callable[..., T], args: tuple[Any, ...]) -> Any:
        if self._executor is None:
            self._start()
        try:
            return self._executor.submit(function, *args)
        except BrokenExecutor:  # the process went down since the last call
            self.kill()
            self._start()
            return self._executor.submit(function, *args)

    def _start(self) -> None:
        self._executor = _start_executor()
        # This runs before the process waits for its children. Unlike functions registered with
        # atexit, it also runs in a process that was itself forked by multiprocessing.
        multiprocessing.util.Finalize(None, self.kill, exitpriority=100)

    def forget(self) -> None:
        """Forget the child in a forked process: it belongs to the parent."""
        self._executor, self._lock = None, threading.Lock()

    def kill(self) -> None:
        """Kill the child process, whatever it is doing."""
        if self._executor is not None:
            executor, self._executor = self._executor, None
            kill_pool(executor)


def _start_executor() -> Any:
    """An executor with one process, which ends when this process does."""
    make = import_loky().process_executor.ProcessPoolExecutor
    from onnxlr.system.warm_workers import worker_options  # of classes that loky has

    return start_pool(make, 1, env=WORKER_ENVIRONMENT, **worker_options())


_SANDBOX = _Sandbox()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SANDBOX.forget)


def run_in_sandbox(
    function: Callable[..., T], *args: Any, deadline: Deadline | None = None, task: str
) -> T:
    """Call a function in the sandbox and return its result; exceptions it raises arrive here.

    Parameters
    ----------
    function : callable
        A function of a module: it is pickled, and so are the arguments.
    *args
    deadline : Deadline, optional
        When it has passed, the process is killed; by default that of a small model.
    task : str
        What is being done, for messages: "opening net.onnx".

    Raises
    ------
    CrashError
        If the process goes down or is late.
    """
    deadline = deadline or Deadline(SMALL_MODEL_SECONDS)
    return _SANDBOX.run(function, *args, deadline=deadline, task=task)
