"""How a process of ours ends: because it is asked to, or because its parent is no more.

It is the first that the command imports: little, so that Ctrl-C is heard from early on.
"""

import contextlib
import os
import signal
import sys
import time
from types import FrameType

TYPE_CHECKING = False  # typing's own takes a while to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXIT_INTERRUPTED = 130  # what shells expect after Ctrl-C
# What asks a process to end: people, terminals, and systems that hand out time. Not all have all.
END_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_EVERY = 0.5  # seconds between two looks
_LONGEST = 10.0  # seconds that an end may take
_ONCE = 2.0  # seconds in which the same wish may arrive twice, by the group and by the parent
_at_once = False


def handle_end_signals(handler: "Callable[[int, FrameType | None], None]") -> None:
    """Have a handler called for what asks this process to end, but for what it is to ignore.

    Parameters
    ----------
    handler : callable
        Given the signal's number and the frame it came in.
    """
    for number in END_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def end_signals_blocked() -> "Iterator[None]":
    """Let what asks this process to end wait; what is begun meanwhile waits on, and isn't asked."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signal(_: int, __: FrameType | None) -> None:
    """Heard, and already being answered: see ``hear``."""


class Interrupt:
    """Raises KeyboardInterrupt, and not once more while that is being answered.

    Attributes
    ----------
    raised : bool
        Whether it was called: some libraries make an error of their own of what it raises.
    """

    def __init__(self) -> None:
        self.raised = False
        self._latest, self._process = -_ONCE, os.getpid()

    def __call__(self, number: int, _: FrameType | None) -> None:
        """See ``hear``."""
        if os.getpid() != self._process:  # a fork, which hasn't come to ``as_usual`` yet
            restore_default_handlers()
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if now - self._latest >= _ONCE:
            self.raised, self._latest = True, now
            raise KeyboardInterrupt


def restore_default_handlers() -> None:
    """Hear no more what ``hear`` was told to have heard by ``Interrupt`` or ``ignore``."""
    for number in END_SIGNALS:
        handler = signal.getsignal(number)
        if handler is ignore_signal or isinstance(handler, Interrupt):
            usual = number != signal.SIGINT
            signal.signal(number, signal.SIG_DFL if usual else signal.default_int_handler)


def exit_soon(code: int) -> None:
    """End this process soon, even if threads that somebody left behind would keep it.

    Parameters
    ----------
    code : int
        What it ends with.
    """
    import threading

    handle_end_signals(lambda *_: os._exit(code))
    timer = threading.Timer(_LONGEST, os._exit, [code])
    timer.daemon = True
    timer.start()


def exit_with_parent(parent: int, *, by_kernel: bool) -> None:
    """End this process when its parent is no more, however that ended.

    Parameters
    ----------
    parent : int
        The process that began this one.
    by_kernel : bool
        Whether that was in its main thread: the system (Linux) then ends this one, whatever it
        does. Else it does so itself, once Python has its turn: some of linear algebra lets it wait.
    """
    import threading

    global _at_once
    _at_once = by_kernel
    if by_kernel and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def is_command_process() -> bool:
    """Whether this process serves one command alone, which it works for in its main thread."""
    return _at_once
