"""The process that runs the command: its streams, its resource limits, and how it ends.

It is imported before anything large, so that Ctrl-C is handled from early on.
"""

import os
import signal
import sys
import time
import warnings

from onnxlr.system.signals import end_signals_blocked, handle_end_signals

TRACEBACK_VARIABLE = "ONNXLR_TRACEBACK"  # environment variable: errors show where they come from
CAN_FORK = sys.platform not in ("win32", "darwin")  # Apple's frameworks break in a forked process
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_PARENT_POLL_SECONDS = 0.5  # between two looks whether the parent process still runs
_EXIT_SECONDS = 10.0  # that Python's own shutdown may take
_MEMORY_NEEDED, _FILES_NEEDED = 1 << 30, 64  # bytes of address space, open files
_is_command_process = False


def shows_tracebacks() -> bool:
    """Whether the environment's ``ONNXLR_TRACEBACK`` asks for errors with their traceback."""
    return bool(os.environ.get(TRACEBACK_VARIABLE))


def open_closed_streams() -> None:
    """Connect standard streams that are closed to the null device.

    Otherwise the next file that is opened would get the stream's number, and others would print
    into it.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free: this one


def reserve_standard_output() -> None:
    """Give Python's ``sys.stdout`` the standard output alone: a report in JSON must be all of it.

    C++ libraries print to it on their own account: HiGHS says which solutions it polishes although
    it is set to be silent (jump-dev/HiGHS.jl issue 312). Their output goes to the null device.
    Characters that the encoding lacks are printed as question marks. Streams are flushed at every
    line, so that a failure to print shows before this process ends.
    """
    for name, number in (("stdout", os.dup(1)), ("stderr", 2)):
        stream = getattr(sys, name)
        encoding = "utf-8" if stream is None else stream.encoding
        setattr(sys, name, open(number, "w", 1, encoding, "replace"))  # noqa: PTH123, SIM115
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def silence_warnings() -> None:
    """Hide warnings, which are for developers; ``PYTHONWARNINGS=default`` shows them."""
    if not sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = "ignore"  # for the processes that this one starts
        warnings.simplefilter("ignore")


def check_resource_limits() -> None:
    """End this process with a message where the system grants it too few resources.

    Libraries that run into such a limit crash, each in its own way.
    """
    if not CAN_FORK:
        return
    import resource

    for kind, least, words in (
        (resource.RLIMIT_AS, _MEMORY_NEEDED, "bytes of address space (ulimit -v)"),
        (resource.RLIMIT_NOFILE, _FILES_NEEDED, "open files (ulimit -n)"),
    ):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY and most < least:
            print_error(
                f"limited to {most:,} {words}, at least {least:,} are needed: raise the limit"
            )
            os._exit(1)
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return  # threads may fail to start for want of address space, which is no limit on threads
    # For linear algebra, for worker processes, for runs of ONNX Runtime.
    count = 12 + 6 * min(8, len(os.sched_getaffinity(0)))
    with end_signals_blocked():  # only this process answers them
        try:
            child = os.fork()  # threads leave their memory reserved: try them in another process
        except OSError:
            child = -1
        if child == 0:
            os._exit(0 if can_start_threads(count) else 1)
    if child < 0 or os.waitpid(child, 0)[1]:
        print_error(
            f"this user may not have {count} more threads and processes, which are needed: raise "
            "the limit (ulimit -u, or the container's limit of pids)"
        )
        os._exit(1)


def can_start_threads(count: int) -> bool:
    """Whether this process can run so many more threads at once."""
    import threading

    done = threading.Event()
    try:
        for _ in range(count):
            threading.Thread(target=done.wait, daemon=True).start()
    except RuntimeError:
        return False
    finally:
        done.set()
    return True


def print_error(text: str) -> None:
    """Print one line to the standard error without Python's streams, which may fail."""
    try:
        os.write(2, f"onnxlr: {text}\n".encode())
    except OSError:
        return  # the stream is closed


def failure_line(error: Exception) -> str:
    """The line for a failure outside of any command: its message, cut to 300 characters.

    The kind of the error comes first where the message may mean nothing without it.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = "" if isinstance(error, (ImportError, OSError)) else f"{type(error).__name__}: "
    return kind + " ".join(text.split())[:300]


def exit_soon(code: int) -> None:
    """End this process with an exit code within ten seconds, or at the next signal to end.

    Threads that a library left running could otherwise keep it alive.
    """
    import threading

    handle_end_signals(lambda *_: os._exit(code))
    timer = threading.Timer(_EXIT_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


def exit_with_parent(parent: int, *, by_kernel: bool) -> None:
    """End this process when its parent has ended, however that happened.

    Parameters
    ----------
    parent : int
        Process id of the parent.
    by_kernel : bool
        Whether Linux is told to kill this process, whatever it does, when the thread that started
        it ends: only right if that was the parent's main thread. A thread of this process looks
        after the parent in any case. That one works once Python has its turn, which some linear
        algebra delays.
    """
    import threading

    global _is_command_process
    _is_command_process = by_kernel
    if by_kernel:
        end_by_kernel_with_parent()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_by_kernel_with_parent() -> None:
    """Tell Linux to kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def is_command_process() -> bool:
    """Whether this process runs one command and nothing else, in its main thread."""
    return _is_command_process
