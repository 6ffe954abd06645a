"""How commands begin and end: what they import, signals, and one line for whatever fails."""

import contextlib
import errno
import os
import threading
from importlib import import_module
from typing import Any

import click

from onnxlr.errors import OnnxlrError, one_line
from onnxlr.system.process import failure_line, is_command_process, shows_tracebacks
from onnxlr.system.signals import (
    EXIT_INTERRUPTED,
    Interrupt,
    handle_end_signals,
    ignore_signal,
    restore_default_handlers,
)

_WITH_WORKERS = ("optimize", "apply", "compare", "bench")  # commands that run models
_EXPECTED_ERRORS = (OnnxlrError, OSError, MemoryError)

# What holds for every command; REFERENCE.md says more of it.
EPILOG = """\b
Exit codes:
  0    OUT, or what was asked for, is written; "no gain" is a result too
  1    the model or the data can't be used or run, or OUT can't be written
  2    wrong usage
  3    the budget, or a limit, can't be met
  130  interrupted

\b
Environment:
  ONNXLR_CACHE=DIR         keep what later runs use there; off keeps nothing
  ONNXLR_CACHE_SIZE=500MB  the size of that, in place of 1 GB
  ONNXLR_TRIAL=SECONDS     limit of a model's first runs; off tries none
  ONNXLR_TRACEBACK=1       show where a defect of onnxlr is
  PYTHONWARNINGS=default   show the warnings of libraries
"""

if hasattr(os, "register_at_fork"):  # processes of a metric end as any others do
    os.register_at_fork(after_in_child=restore_default_handlers)


def _start_fork_server() -> None:
    """Import what workers run, and fork the process that forks them while this one has no other."""
    from onnxlr.system.children import import_joblib
    from onnxlr.system.fork_server import FORK_SERVER

    import_joblib()
    import_module("joblib.externals.loky.process_executor")
    FORK_SERVER.start()


class Command(click.Command):
    """A command that imports its work once its words are read, and handles signals from then on."""

    def invoke(self, ctx: click.Context) -> Any:
        """Import what the work needs, then do it.

        Raises
        ------
        OnnxlrError
            If a package can't be imported.
        """
        # Until all is imported, a signal ends the process at once (see onnxlr.__main__): a library
        # may lose an exception that interrupts its import, or print many lines about it.
        try:
            from onnxlr.cli import actions  # noqa: F401
        except Exception as error:  # whatever a package raises that doesn't fit the others
            if shows_tracebacks():
                raise
            raise OnnxlrError(f"can't be started: {failure_line(error)}") from None
        if self.name in _WITH_WORKERS and is_command_process():
            with contextlib.suppress(Exception):  # whoever needs the package meets its error again
                _start_fork_server()
        if threading.current_thread() is threading.main_thread():
            # When a scheduler stops the command, or its terminal closes, it cleans up as at Ctrl-C.
            handle_end_signals(ctx.obj)
        return super().invoke(ctx)


class CommandGroup(click.Group):
    """The commands; each failure ends in one line and with the exit code of its kind."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        """Read the words of a command and run it."""
        ctx.obj = interrupt = Interrupt()  # the handler of signals while a command works
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except BaseException as error:
            # A library may have made another error of the interruption.
            if isinstance(error, KeyboardInterrupt) or interrupt.raised:
                handle_end_signals(ignore_signal)
                click.echo("onnxlr: interrupted; no file was left half-written", err=True)
                ctx.exit(EXIT_INTERRUPTED)
            shows = shows_tracebacks() and not isinstance(error, _EXPECTED_ERRORS)
            if shows and isinstance(error, Exception):
                raise
            # A method, or what it calls, may raise SystemExit: that isn't the command's end.
            if text := message_of(error):
                click.echo(f"onnxlr: {text}", err=True)
            ctx.exit(error.exit_code if isinstance(error, OnnxlrError) else 1)


def message_of(error: BaseException) -> str:
    """The line that the user reads of a failure; empty if the reader of a pipe has gone."""
    match error:
        case OnnxlrError():
            return str(error)
        case OSError():  # such as a closed pipe or a full device, which can't be printed to
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
            # A defect of onnxlr or of a method, not of the input.
            from onnxlr.methods.registry import culprit

            method = culprit(error)
            return (
                f"internal error{f' in {method}' if method else ''} "
                f"({type(error).__name__}: {one_line(error)}): please report it"
                f"{' there, and choose others with --method' if method else ''}; "
                "ONNXLR_TRACEBACK=1 shows where"
            )
