"""Signals that ask a process to end: how they are handled, and held back while a process starts.

The command imports this module first. It imports little, so that Ctrl-C is handled from early on.
"""

import contextlib
import os
import signal
import sys
import time
from types import FrameType

TYPE_CHECKING = False  # importing it from typing takes a while
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXIT_INTERRUPTED = 130  # the exit code that shells expect after Ctrl-C
# Sent by people, terminals and job schedulers. Not every system has all of them.
END_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
# Seconds in which one request may arrive twice: from the process group and from the parent.
_REPEAT_SECONDS = 2.0


def handle_end_signals(handler: "Callable[[int, FrameType | None], None]") -> None:
    """Install a handler for every signal that asks this process to end.

    Signals that the process was started to ignore, as by ``nohup``, stay ignored.

    Parameters
    ----------
    handler : callable
        It gets the signal's number and the interrupted frame.
    """
    for number in END_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def end_signals_blocked() -> "Iterator[None]":
    """Block ``END_SIGNALS`` in this thread within the context.

    Those that arrive meanwhile are delivered afterwards. Processes that are started within inherit
    the block and keep it, so that only this process answers.
    """
    if sys.platform == "win32":
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore_signal(_: int, __: FrameType | None) -> None:
    """Do nothing: the handler for when an earlier signal is already being answered."""


class Interrupt:
    """A signal handler that raises KeyboardInterrupt, though not again within two seconds.

    Attributes
    ----------
    raised : bool
        Whether it has raised: some libraries turn KeyboardInterrupt into an error of their own.
    """

    def __init__(self) -> None:
        self.raised = False
        self._last_time, self._process = -_REPEAT_SECONDS, os.getpid()

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Answer a signal; the arguments are those that ``handle_end_signals`` describes."""
        if os.getpid() != self._process:  # a fork that hasn't restored the default handlers yet
            restore_default_handlers()
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if now - self._last_time >= _REPEAT_SECONDS:
            self.raised, self._last_time = True, now
            raise KeyboardInterrupt


def restore_default_handlers() -> None:
    """Put Python's default handlers back where ``Interrupt`` or ``ignore_signal`` is installed."""
    for number in END_SIGNALS:
        handler = signal.getsignal(number)
        if handler is ignore_signal or isinstance(handler, Interrupt):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
