"""The ``onnxlr`` command as a process that reports how it ended, even after a crash.

A C++ library may crash its process, and the system kills processes where memory is short. So the
command does its work in a child process, forked before anything large is imported, and the parent
reports how the child ended. Where there is no fork, or it isn't safe, the work is done here.
"""

import os
import signal
from types import FrameType

from onnxlr.system.process import (
    CAN_FORK,
    check_resource_limits,
    exit_soon,
    exit_with_parent,
    failure_line,
    open_closed_streams,
    print_error,
    reserve_standard_output,
    shows_tracebacks,
    silence_warnings,
)
from onnxlr.system.signals import (
    END_SIGNALS,
    EXIT_INTERRUPTED,
    end_signals_blocked,
    handle_end_signals,
    ignore_signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_GRACE_SECONDS = 10  # between a request to end and killing the child


def main() -> None:
    """Run the command and exit with its code; a signal that kills it is reported in one line."""
    handle_end_signals(_exit_at_start)
    open_closed_streams()
    if not CAN_FORK:
        _run_command(None)
    parent = os.getpid()
    # Undo what the parent process may have blocked or ignored.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*END_SIGNALS, signal.SIGALRM, signal.SIGCHLD))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else nobody could wait for a child
    with end_signals_blocked():  # a signal that arrives during the fork would be lost
        try:
            reading, writing = os.pipe()
            child = os.fork()
        except OSError:  # no more files or processes for this user: the rest may still go well
            child = -1
        if child > 0:
            handle_end_signals(lambda number, _: _forward_signal(child, number))
            signal.signal(signal.SIGALRM, lambda *_: _kill_and_exit(child))
    if child < 0:
        _run_command(None)
    if child:
        os.close(writing)
        status = os.waitpid(child, 0)[1]
        os.set_blocking(reading, False)
        _exit_like_child(status, _read_exit_code(reading))
    os.close(reading)
    exit_with_parent(parent, by_kernel=True)
    _run_command(writing)


def _run_command(pipe: int | None) -> "NoReturn":
    """Run the command in this process and write its exit code, one byte, to the pipe."""
    reserve_standard_output()
    check_resource_limits()
    silence_warnings()
    try:
        from onnxlr.cli.commands import main as command
    except Exception as error:  # whatever a package raises that doesn't fit the others
        if shows_tracebacks():
            raise
        print_error(f"can't be started: {failure_line(error)}")
        os._exit(1)
    try:
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        if pipe is not None:
            os.write(pipe, bytes([code]))
        exit_soon(code)
        raise
    except Exception as error:  # outside of any command: --help that can't be printed, completion
        if shows_tracebacks():
            raise
        print_error(failure_line(error))
        os._exit(1)
    raise AssertionError("the command ends by SystemExit")


def _exit_at_start(_: int, __: FrameType | None) -> None:
    """Exit before any work has begun: there is nothing to clean up."""
    handle_end_signals(ignore_signal)
    print_error("interrupted before anything was begun")
    os._exit(EXIT_INTERRUPTED)


def _forward_signal(child: int, number: int) -> None:
    remaining = signal.alarm(_GRACE_SECONDS)
    if remaining:  # a repeated request doesn't put off the end; nor does an alarm of the parent's
        signal.alarm(min(remaining, _GRACE_SECONDS))
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return  # it has just ended


def _kill_and_exit(child: int) -> None:
    """Kill a child that doesn't answer: Python handles signals only between two calls.

    A single call for linear algebra may take long. Nothing is lost: unfinished files lie in a
    folder that the next run clears away.
    """
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return
    print_error("interrupted; no file was left half-written")
    os._exit(EXIT_INTERRUPTED)


def _read_exit_code(pipe: int) -> bytes:
    """The byte that the child wrote; empty if it wrote none."""
    try:
        return os.read(pipe, 1)
    except BlockingIOError:  # a process that a metric started still holds the pipe open
        return b""


def _exit_like_child(status: int, code_byte: bytes) -> None:
    """Exit with the code that the child wrote, whatever became of its process after that."""
    if code_byte:
        os._exit(code_byte[0])
    if not os.WIFSIGNALED(status):
        code = os.WEXITSTATUS(status)
        if code == 0:
            print_error(
                "something within ended the process too early: does a --metric of yours exit?"
            )
            code = 1
        os._exit(code)
    number = os.WTERMSIG(status)
    if number in END_SIGNALS:  # a second request, when Python no longer handled signals
        os._exit(EXIT_INTERRUPTED)
    print_error(_describe_signal(number))
    os._exit(1)


def _describe_signal(number: int) -> str:
    has_name = number in {s.value for s in signal.Signals}  # real-time signals may have none
    name = signal.Signals(number).name if has_name else f"signal {number}"
    if number == signal.SIGKILL:
        return (
            f"stopped from outside ({name}); no file was left half-written. If nobody stopped it, "
            "the system ran out of memory: name fewer --jobs or a smaller --batch"
        )
    if number == signal.SIGBUS:
        return (
            f"a file that was being read was cut short by another program ({name}): IN, its "
            "external data or the samples; no file was left half-written. Run again when it is "
            "whole"
        )
    if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        return (
            f"a library crashed ({name}), most likely ONNX Runtime on this model and these "
            "samples; no file was left half-written. --verify none runs nothing"
        )
    return f"stopped by {name}; no file was left half-written"


if __name__ == "__main__":
    main()
