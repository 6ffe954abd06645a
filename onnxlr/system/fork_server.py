"""A process that was forked while this one was warm and had nothing under way: it forks workers.

A worker that is a new interpreter imports everything anew, which takes seconds; one that is forked
from a warm process has it all. But a process that has sessions, threads and locks can't be forked
safely. So one that has none of them yet is forked first, and does nothing but fork.
"""

import contextlib
import gc
import json
import multiprocessing.process
import os
import pickle
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from onnxlr.system.process import CAN_FORK, end_by_kernel_with_parent
from onnxlr.system.signals import end_signals_blocked

_MOST_BYTES, _MOST_FILES = 1 << 16, 253  # of a request; the latter is Linux's limit
_streams: list[Any] = []  # of the parent, which would close files of these numbers if they went


class ForkServer:
    """The process that forks workers, once ``start`` has started it.

    Attributes
    ----------
    pid : int or None
        Its process id; None where there is no such process.
    """

    def __init__(self) -> None:
        self.pid: int | None = None
        self._requests: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start it; to be called when all is imported, and before any threads do work.

        Where the system can't fork, or allows no more processes, there is none.
        """
        if not CAN_FORK or self._requests is not None:
            return
        parent = os.getpid()
        try:
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            return
        # Python warns of threads. Those of linear algebra are prepared for a fork, and the one that
        # waits for the end of the parent holds no lock.
        with there, end_signals_blocked(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                pid = os.fork()
            except OSError:
                here.close()
                return
            if pid == 0:
                here.close()
                _serve(there, parent)
        self.pid, self._requests = pid, here

    def fork(self, numbers: Sequence[int]) -> int:
        """Fork a worker, and return its process id.

        Parameters
        ----------
        numbers : sequence of int
            Files that are open here, and in the worker under the same numbers. From the first it
            reads what it is to do.

        Raises
        ------
        OSError
            If there is no server, or it can't fork.
        """
        with self._lock:
            if self._requests is None:
                raise ProcessLookupError("there is no fork server")
            try:
                socket.send_fds(self._requests, [json.dumps(numbers).encode()], numbers)
                answer = int(self._requests.recv(100) or 0)
            except OSError:
                answer = 0
            if answer == 0:
                self.forget()
                raise ProcessLookupError("the fork server has ended")
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return answer

    def forget(self) -> None:
        """Have no server any more; it ends when no process can ask it for anything."""
        if self._requests is not None:
            self._requests.close()
        self.pid, self._requests = None, None

    def forget_after_fork(self) -> None:
        """Forget the server in a forked process: it belongs to the parent."""
        self._lock = threading.Lock()
        self.forget()


FORK_SERVER = ForkServer()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FORK_SERVER.forget_after_fork)


def _serve(requests: socket.socket, parent: int) -> NoReturn:
    """Fork a worker for each request until the parent has ended."""
    with contextlib.suppress(Exception):
        end_by_kernel_with_parent()
        _connect_to_nothing()
        _close_all_but({requests.fileno()})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for workers
        gc.freeze()  # what was made so far stays shared as long as nothing marks it
        while os.getppid() == parent:
            content, files, *_ = socket.recv_fds(requests, _MOST_BYTES, _MOST_FILES)
            if not content:
                break
            try:
                pid = os.fork()
            except OSError as error:
                pid = -(error.errno or 1)
            if pid == 0:
                _become_worker(files, json.loads(content))
            for file in files:
                os.close(file)
            requests.send(b"%d" % pid)
    os._exit(0)


def _become_worker(files: Sequence[int], numbers: Sequence[int]) -> NoReturn:
    code = 1
    with contextlib.suppress(Exception):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _renumber(files, numbers)
        code = _work(numbers[0])
    os._exit(code)


def _work(file: int) -> int:
    """Do what a process does that loky has started, and return its exit code.

    The file has its environment, how it is prepared, and itself, all pickled.
    """
    from joblib.externals.loky.backend import spawn

    current: Any = multiprocessing.process.current_process()
    current._inheriting = True  # what refers to files of the parent may be unpickled
    try:
        with os.fdopen(file, "rb") as pipe:
            environment = pickle.load(pipe)  # noqa: S301 - made by ``warm_workers``, as the others
            os.environ.clear()
            os.environ.update(environment)
            spawn.prepare(pickle.load(pipe))  # noqa: S301
            worker = pickle.load(pipe)  # noqa: S301
    finally:
        del current._inheriting
    code: int = worker._bootstrap()
    return code


def _renumber(files: Sequence[int], numbers: Sequence[int]) -> None:
    """Give open files these numbers, and close all others but the standard streams."""
    import fcntl

    above = max(numbers) + 1  # out of the way of the numbers
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in files]
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number, inheritable=False)
    _close_all_but(numbers)


def _connect_to_nothing() -> None:
    """Connect the standard streams to the null device, and Python's streams to them."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        os.dup2(nowhere, number)
        _streams.append(getattr(sys, name))
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _close_all_but(numbers: Collection[int]) -> None:
    """Close all files with numbers from 3 on but these."""
    first = 3
    for number in sorted(numbers):
        os.closerange(first, number)
        first = number + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
