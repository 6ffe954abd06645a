"""What the commands print with: progress bars, one line an error, pipes that close."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

from onnxlr.errors import OnnxlrError, one_line
from onnxlr.methods.registry import culprit

EXPECTED_ERRORS = (OnnxlrError, OSError, MemoryError)


def message_of(error: BaseException) -> str:
    """What is said of a failure; nothing where nobody listens."""
    match error:
        case OnnxlrError():
            return str(error)
        case OSError():  # a closed pipe, a full device: what is printed can't be
            if error.errno == errno.EPIPE:
                return ""
            where = f"{str(error.filename)[:200]}: " if error.filename else ""
            return f"{where}{error.strerror or error}"
        case MemoryError():
            return (
                "out of memory; nothing was written: close other programs, name fewer --jobs or a "
                "smaller --batch, or use a machine with more"
            )
        case _:
            # A defect of ours, not of the input. A pipeline still gets one line and no half file.
            method = culprit(error)
            return (
                f"internal error{f' in {method}' if method else ''} "
                f"({type(error).__name__}: {one_line(error)}): please report it"
                f"{' there, and choose others with --method' if method else ''}; "
                "ONNXLR_TRACEBACK=1 shows where"
            )


class _Printer(Console):
    """A console whose reader may go away: that is an end like others, and Rich's own is none."""

    def on_broken_pipe(self) -> None:
        """What is left to be printed goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
        raise BrokenPipeError(errno.EPIPE, "nobody reads")


class ProgressBars:
    """Progress of every stage on standard error."""

    def __init__(self) -> None:
        console = _Printer(stderr=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[item]}", markup=False),
            console=console,
            transient=True,
        )
        self._seen = console.is_terminal

    @contextmanager
    def stage(self, description: str, total: int | None) -> Iterator[Callable[[str], None]]:
        """A bar while the stage lasts, where somebody sees it."""
        if not self._seen:
            yield lambda _: None
            return
        with self._bars:
            task = self._bars.add_task(description, total=total, item="")

            def step(item: str) -> None:
                self._bars.update(task, advance=1, item=item[-50:])

            try:
                yield step
            finally:
                self._bars.remove_task(task)


def open_console() -> Console:
    """The console that tables are printed on, as wide as they need where nobody looks."""
    # Piped output keeps whole rows: a report that is cut at 80 columns can't be searched.
    return _Printer(
        width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False
    )
