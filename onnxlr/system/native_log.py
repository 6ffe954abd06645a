"""What native libraries print to the standard output and to the standard error, caught."""

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeVar

from onnxlr.system.runtime import LOG_ERROR, LOG_FATAL, import_runtime, runtime_reason

T = TypeVar("T")

_ERROR = re.compile(r"\[E:onnxruntime[^\]]*\] (.+)")
_OUTPUT, _STDERR = 1, 2


@contextlib.contextmanager
def native_stderr() -> Iterator[Callable[[], str]]:
    """Catch what this process prints to the standard error; gives a reader of it."""
    with _caught(_STDERR) as read:
        yield lambda: read().decode(errors="replace")


@contextlib.contextmanager
def _caught(descriptor: int) -> Iterator[Callable[[], bytes]]:
    """Catch what this process prints meanwhile, below Python's streams; gives a reader of it.

    Where the stream is closed, or no file can be made, nothing is caught.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            kept = os.dup(descriptor)
        except OSError:
            yield lambda: b""
            return
        stack.callback(os.close, kept)

        def read() -> bytes:
            file.seek(0)
            return file.read()

        os.dup2(file.fileno(), descriptor)
        try:
            yield read
        finally:
            os.dup2(kept, descriptor)


def without_lines(beginning: str, function: Callable[[], T]) -> T:
    """Call a function, and drop lines of this beginning that native code prints meanwhile.

    All else that is printed to the standard output, by other threads too, comes out after it.
    """
    _flush()
    printed = b""
    try:
        with _caught(_OUTPUT) as read:
            try:
                return function()
            finally:
                _flush()
                printed = read()
    finally:
        lines = printed.splitlines(keepends=True)
        kept = b"".join(line for line in lines if not line.startswith(beginning.encode()))
        with contextlib.suppress(OSError):
            while kept:
                kept = kept[os.write(_OUTPUT, kept) :]


def _flush() -> None:
    """Write out what Python and the C library hold back for the standard output."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # none, or closed
        sys.stdout.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def logged_error(function: Callable[[], object]) -> str:
    """What ONNX Runtime logs as the first error while a function runs; empty if nothing."""
    runtime = import_runtime()
    with native_stderr() as log:
        runtime.set_default_logger_severity(LOG_ERROR)
        try:
            function()
        finally:
            runtime.set_default_logger_severity(LOG_FATAL)
        found = _ERROR.search(log())
    return "" if found is None else runtime_reason(found[1]).removeprefix("[ERROR] ")
