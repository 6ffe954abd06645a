"""What the commands print with: progress bars, and tables for pipes that may close."""

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


class _PipeConsole(Console):
    """A console whose reader may go away, which ends the command as other errors do."""

    def on_broken_pipe(self) -> None:
        """Send what is left to be printed nowhere, and raise an error that the command ends with.

        Raises
        ------
        BrokenPipeError
            Always.
        """
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
        raise BrokenPipeError(errno.EPIPE, "nobody reads")


class ProgressBars:
    """Progress of every stage on standard error."""

    def __init__(self) -> None:
        console = _PipeConsole(stderr=True)
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
        self._console, self._on_terminal = console, console.is_terminal

    @contextmanager
    def stage(self, description: str, total: int | None) -> Iterator[Callable[[str], None]]:
        """Show a bar while the stage lasts, if the standard error is a terminal."""
        if not self._on_terminal:
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

    def tell(self, line: str) -> None:
        """Print a line that stays, if the standard error is a terminal: the report has it too."""
        if self._on_terminal:
            self._console.print(line, style="dim", markup=False, highlight=False)


def open_console() -> Console:
    """The console that tables are printed on: as wide as the terminal, or 200 columns."""
    # Piped output keeps whole rows: a report that is cut at 80 columns can't be searched.
    return _PipeConsole(
        width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False
    )
