"""The ``onnxlr`` command as a process: it ends with a line of its own, whatever brings it down.

Libraries of C++ may take a process with them, and where memory is short the system does. So the
command does its work in a process of its own, forked before anything large is imported, and this
one tells how that ended. Where there is no fork, or it isn't safe, the work is done here.
"""

import os
import signal
import sys
from types import FrameType

from onnxlr.ending import ENDINGS, INTERRUPTED, end_with, hear, ignore

_FORKS = sys.platform not in ("win32", "darwin")  # Apple's frameworks don't outlive a fork


def main() -> None:
    """Run the command and end as it ends; a signal that brings it down is told in a line."""
    parent = os.getpid()
    hear(_leave)
    if _FORKS:
        try:
            child = os.fork()
        except OSError:  # no more processes for this user: the rest may still go well
            child = 0
        if child:
            hear(lambda number, _: _pass_on(child, number))
            _end_as(os.waitpid(child, 0)[1])
        if os.getpid() != parent:
            end_with(parent)
    from onnxlr.cli import main as command  # a second of imports, in which Ctrl-C is heard

    command()


def _leave(_: int, __: FrameType | None) -> None:
    """Nothing has begun: there is nothing to clean up."""
    hear(ignore)
    _say("interrupted before anything was begun")
    os._exit(INTERRUPTED)


def _pass_on(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return  # it has just ended


def _end_as(status: int) -> None:
    if not os.WIFSIGNALED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    if number in ENDINGS:  # once more, when it had answered and Python no longer listened
        os._exit(INTERRUPTED)
    _say(_why(number))
    os._exit(1)


def _why(number: int) -> str:
    known = number in {s.value for s in signal.Signals}  # not those of the system's own use
    name = signal.Signals(number).name if known else f"signal {number}"
    if number == signal.SIGKILL:
        return (
            f"stopped from outside ({name}); no file was left half-written. Where nobody did, the "
            "system was out of memory: name fewer --jobs or a smaller --batch"
        )
    if number == signal.SIGBUS:
        return (
            f"a file that was being read was cut short by another program ({name}): IN, its "
            "external data or the samples; nothing of ours was left half-written. Run again when "
            "they are whole"
        )
    if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        return (
            f"a library crashed ({name}), most likely ONNX Runtime on this model and these "
            "samples; no file was left half-written. --verify none runs nothing"
        )
    return f"stopped by {name}; no file was left half-written"


def _say(text: str) -> None:
    try:
        os.write(2, f"onnxlr: {text}\n".encode())
    except OSError:
        return  # nobody listens


if __name__ == "__main__":
    main()
