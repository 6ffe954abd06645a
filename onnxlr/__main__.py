"""The ``onnxlr`` command as a process: it ends with a line of its own, whatever brings it down.

Libraries of C++ may take a process with them, and where memory is short the system does. So the
command does its work in a process of its own, forked before anything large is imported, and this
one tells how that ended. Where there is no fork, or it isn't safe, the work is done here.
"""

import os
import signal
from types import FrameType

from onnxlr.system.process import (
    CAN_FORK,
    check_resource_limits,
    failure_line,
    open_closed_streams,
    print_error,
    reserve_standard_output,
    silence_warnings,
)
from onnxlr.system.signals import (
    END_SIGNALS,
    EXIT_INTERRUPTED,
    end_signals_blocked,
    exit_soon,
    exit_with_parent,
    handle_end_signals,
    ignore_signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_PATIENCE = 10  # seconds between a wish to end and the end


def main() -> None:
    """Run the command and end as it ends; a signal that brings it down is told in a line."""
    handle_end_signals(_leave)
    open_closed_streams()
    if not CAN_FORK:
        _work(None)
    parent = os.getpid()
    # Whatever the parent has blocked, or left ignored.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*END_SIGNALS, signal.SIGALRM, signal.SIGCHLD))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else nobody could wait for a child
    with end_signals_blocked():  # a fork forgets what arrives then
        try:
            reading, writing = os.pipe()
            child = os.fork()
        except OSError:  # no more files or processes for this user: the rest may still go well
            child = -1
        if child > 0:
            handle_end_signals(lambda number, _: _pass_on(child, number))
            signal.signal(signal.SIGALRM, lambda *_: _end_now(child))
    if child < 0:
        _work(None)
    if child:
        os.close(writing)
        status = os.waitpid(child, 0)[1]
        os.set_blocking(reading, False)
        _end_as(status, _read(reading))
    os.close(reading)
    exit_with_parent(parent, by_kernel=True)
    _work(writing)


def _work(telling: int | None) -> "NoReturn":
    """The command itself, in this process; that it came to its end is told."""
    reserve_standard_output()
    check_resource_limits()
    silence_warnings()
    shows = bool(os.environ.get("ONNXLR_TRACEBACK"))
    try:
        from onnxlr.cli.commands import main as command
    except Exception as error:  # whatever a package raises that doesn't fit the others
        if shows:
            raise
        print_error(f"can't be started: {failure_line(error)}")
        os._exit(1)
    try:
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        if telling is not None:
            os.write(telling, bytes([code]))
        exit_soon(code)
        raise
    except Exception as error:  # outside of any command: --help that can't be printed, completion
        if shows:
            raise
        print_error(failure_line(error))
        os._exit(1)
    raise AssertionError("the command ends by SystemExit")


def _leave(_: int, __: FrameType | None) -> None:
    """Nothing has begun: there is nothing to clean up."""
    handle_end_signals(ignore_signal)
    print_error("interrupted before anything was begun")
    os._exit(EXIT_INTERRUPTED)


def _pass_on(child: int, number: int) -> None:
    left = signal.alarm(_PATIENCE)
    if left:  # saying the wish again doesn't put off the end; nor does an alarm of the parent's
        signal.alarm(min(left, _PATIENCE))
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return  # it has just ended


def _end_now(child: int) -> None:
    """It doesn't hear: Python listens between two calls, and one for linear algebra may be long.

    Nothing is lost: what is half-done lies in a folder that the next run clears away.
    """
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return
    print_error("interrupted; no file was left half-written")
    os._exit(EXIT_INTERRUPTED)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1)
    except BlockingIOError:  # nothing was written, and a process of a metric's holds it open
        return b""


def _end_as(status: int, told: bytes) -> None:
    """End as the work did: with the code it told, whatever came of the process after that."""
    if told:
        os._exit(told[0])
    if not os.WIFSIGNALED(status):
        code = os.WEXITSTATUS(status)
        if code == 0:
            print_error("it was ended from within, by a metric perhaps, before it was done")
            code = 1
        os._exit(code)
    number = os.WTERMSIG(status)
    if number in END_SIGNALS:  # once more, when it had answered and Python no longer listened
        os._exit(EXIT_INTERRUPTED)
    print_error(_why(number))
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


if __name__ == "__main__":
    main()
