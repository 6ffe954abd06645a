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

INTERRUPTED = 130  # what shells expect after Ctrl-C
# What asks a process to end: people, terminals, and systems that hand out time. Not all have all.
ENDINGS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_EVERY = 0.5  # seconds between two looks
_LONGEST = 10.0  # seconds that an end may take
_ONCE = 2.0  # seconds in which the same wish may arrive twice, by the group and by the parent
_at_once = False


def hear(handler: "Callable[[int, FrameType | None], None]") -> None:
    """Have a handler called for what asks this process to end, but for what it is to ignore.

    Parameters
    ----------
    handler : callable
        Given the signal's number and the frame it came in.
    """
    for number in ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def held() -> "Iterator[None]":
    """Let what asks this process to end wait; what is begun meanwhile waits on, and isn't asked."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore(_: int, __: FrameType | None) -> None:
    """Heard, and already being answered: see ``hear``."""


class Interrupt:
    """Raises KeyboardInterrupt, and not once more while that is being answered.

    Attributes
    ----------
    heard : bool
        Whether it was called: some libraries make an error of their own of what it raises.
    """

    def __init__(self) -> None:
        self.heard = False
        self._latest, self._process = -_ONCE, os.getpid()

    def __call__(self, number: int, _: FrameType | None) -> None:
        """See ``hear``."""
        if os.getpid() != self._process:  # a fork, which hasn't come to ``as_usual`` yet
            as_usual()
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if now - self._latest >= _ONCE:
            self.heard, self._latest = True, now
            raise KeyboardInterrupt


def as_usual() -> None:
    """Hear no more what ``hear`` was told to have heard by ``Interrupt`` or ``ignore``."""
    for number in ENDINGS:
        handler = signal.getsignal(number)
        if handler is ignore or isinstance(handler, Interrupt):
            usual = number != signal.SIGINT
            signal.signal(number, signal.SIG_DFL if usual else signal.default_int_handler)


def end_within(code: int) -> None:
    """End this process soon, even if threads that somebody left behind would keep it.

    Parameters
    ----------
    code : int
        What it ends with.
    """
    import threading

    hear(lambda *_: os._exit(code))
    timer = threading.Timer(_LONGEST, os._exit, [code])
    timer.daemon = True
    timer.start()


def end_with(parent: int, *, at_once: bool) -> None:
    """End this process when its parent is no more, however that ended.

    Parameters
    ----------
    parent : int
        The process that began this one.
    at_once : bool
        Whether that was in its main thread: the system (Linux) then ends this one, whatever it
        does. Else it does so itself, once Python has its turn: some of linear algebra lets it wait.
    """
    import threading

    global _at_once
    _at_once = at_once
    if at_once and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ends_at_once() -> bool:
    """Whether this process serves one command alone, which it works for in its main thread."""
    return _at_once
