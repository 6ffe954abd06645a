"""What native libraries print to the standard error, caught."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator

from onnxlr.system.runtime import LOG_ERROR, LOG_FATAL, import_runtime, runtime_reason

_ERROR = re.compile(r"\[E:onnxruntime[^\]]*\] (.+)")


@contextlib.contextmanager
def native_stderr() -> Iterator[Callable[[], str]]:
    """Catch what this process prints meanwhile, below Python's streams; gives a reader of it.

    Where the standard error is closed, or no file can be made, nothing is caught.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            kept = os.dup(2)
        except OSError:
            yield lambda: ""
            return
        stack.callback(os.close, kept)

        def text() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(kept, 2)


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
