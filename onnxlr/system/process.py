"""What the command needs of the process it runs in: streams of its own, and limits high enough.

It is imported before anything large, as Ctrl-C is to be heard from early on.
"""

import os
import sys
import warnings

from onnxlr.system.signals import end_signals_blocked

CAN_FORK = sys.platform not in ("win32", "darwin")  # Apple's frameworks don't outlive a fork


def open_closed_streams() -> None:
    """Streams that were closed lead nowhere.

    A file that is opened must never get the number of one: others print there.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free: this one


def reserve_standard_output() -> None:
    """The report has the standard output to itself: it may be JSON, and nothing else is with it.

    Libraries of C++ print what nobody asked for: HiGHS says which solutions it polishes, although
    it is told to be silent (jump-dev/HiGHS.jl issue 312). What an encoding lacks is printed as a
    question mark; and by lines, so that what can't be printed is known before this process ends.
    """
    for name, number in (("stdout", os.dup(1)), ("stderr", 2)):
        given = getattr(sys, name)
        encoding = "utf-8" if given is None else given.encoding
        setattr(sys, name, open(number, "w", 1, encoding, "replace"))  # noqa: PTH123, SIM115
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def silence_warnings() -> None:
    """What libraries warn of is for developers: ``PYTHONWARNINGS=default`` shows it."""
    if not sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = "ignore"  # processes of ours too
        warnings.simplefilter("ignore")


def check_resource_limits() -> None:
    """End this process where a system grants too little: libraries die of it in their own ways."""
    if not CAN_FORK:
        return
    import resource

    for kind, least, words in (
        (resource.RLIMIT_AS, 1 << 30, "bytes of address space (ulimit -v)"),
        (resource.RLIMIT_NOFILE, 64, "open files (ulimit -n)"),
    ):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY and most < least:
            print_error(
                f"limited to {most:,} {words}, at least {least:,} are needed: raise the limit"
            )
            os._exit(1)
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return  # threads may fail for want of that
    # For linear algebra, for processes, for runs.
    count = 12 + 6 * min(8, len(os.sched_getaffinity(0)))
    with end_signals_blocked():  # one of us answers
        try:
            trying = os.fork()  # threads leave their memory reserved: not here
        except OSError:
            trying = -1
        if trying == 0:
            os._exit(0 if can_start_threads(count) else 1)
    if trying < 0 or os.waitpid(trying, 0)[1]:
        print_error(
            f"this user may not have {count} more threads and processes, which are needed: raise "
            "the limit (ulimit -u, or the container's limit of pids)"
        )
        os._exit(1)


def can_start_threads(count: int) -> bool:
    """Whether so many threads can be had at once."""
    import threading

    over = threading.Event()
    try:
        for _ in range(count):
            threading.Thread(target=over.wait, daemon=True).start()
    except RuntimeError:
        return False
    finally:
        over.set()
    return True


def print_error(text: str) -> None:
    """One line on the standard error, without what could fail of Python's own."""
    try:
        os.write(2, f"onnxlr: {text}\n".encode())
    except OSError:
        return  # nobody listens


def failure_line(error: Exception) -> str:
    """The line for a failure outside of any command: its message, cut to 300 characters.

    The kind of the error comes first where the message may mean nothing without it.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = "" if isinstance(error, (ImportError, OSError)) else f"{type(error).__name__}: "
    return kind + " ".join(text.split())[:300]
