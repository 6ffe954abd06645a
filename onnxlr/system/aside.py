"""Calls in another thread, so that the one that waits for them answers Ctrl-C meanwhile.

A new thread costs more than a small model's run. So a thread that is done waits for the next call.
"""

import os
import queue
import threading
from collections.abc import Callable

from onnxlr.system.deadline import Deadline

_IDLE_SECONDS = 1.0  # without a call, after which a thread ends


class _Helper:
    """A thread that makes one call after the other."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, call: Callable[[], None]) -> None:
        """Make a call, which raises nothing; ``is_done`` tells of its end once."""
        self._calls.put(call)

    def is_done(self, seconds: float) -> bool:
        """Whether the call ends within so many seconds."""
        try:
            self._ends.get(timeout=seconds)
        except queue.Empty:
            return False
        return True

    def end(self) -> None:
        """Have the thread end after its call."""
        self._calls.put(None)

    def _work(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                try:
                    _IDLE.remove(self)
                except ValueError:  # someone has just taken it for a call
                    continue
                return
            if call is None:
                return
            call()
            del call  # with all that it holds, before anyone goes on
            self._ends.put(None)


_IDLE: list[_Helper] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_IDLE.clear)  # their threads are the parent's


def _idle_helper() -> _Helper:
    try:
        return _IDLE.pop()
    except IndexError:
        return _Helper()


def call_aside(
    work: Callable[[], None], deadline: Deadline, stop: Callable[[], None], stop_seconds: float
) -> bool:
    """Call a function in another thread; returns whether it ended in time.

    Parameters
    ----------
    work : callable
        What it raises is raised here.
    deadline : Deadline
    stop : callable
        It has the work end early. It is called when the work is late, or if anything else is raised
        here meanwhile: KeyboardInterrupt.
    stop_seconds : float
        How long an early end is waited for.
    """
    errors: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    try:
        helper = _idle_helper()
    except RuntimeError:  # this user may have no more threads
        work()
        return True
    in_time = False
    try:
        helper.begin(call)
        in_time = deadline.wait(helper.is_done)
    finally:
        if not in_time:
            stop()
            helper.is_done(stop_seconds)
            helper.end()
    if in_time:
        _IDLE.append(helper)
        if errors:
            raise errors[0]
    return in_time
