"""How commands begin and end: what they import, signals, and one line for whatever fails."""

import errno
import os
import threading
from typing import Any

import click

from onnxlr.errors import OnnxlrError, one_line
from onnxlr.system.process import failure_line, shows_tracebacks
from onnxlr.system.signals import (
    EXIT_INTERRUPTED,
    Interrupt,
    handle_end_signals,
    ignore_signal,
    restore_default_handlers,
)

_EXPECTED_ERRORS = (OnnxlrError, OSError, MemoryError)

if hasattr(os, "register_at_fork"):  # a metric's own processes end as any others do
    os.register_at_fork(after_in_child=restore_default_handlers)


class Command(click.Command):
    """A command whose work is imported once its words are read, and which hears signals then."""

    def invoke(self, ctx: click.Context) -> Any:
        """Import what the work needs, then do it.

        Raises
        ------
        OnnxlrError
            If a package can't be imported.
        """
        # Until all is imported, a signal ends the process at once (onnxlr.__main__): an exception
        # amid an import may be lost in the library, or told in many lines.
        try:
            from onnxlr.cli import actions  # noqa: F401
        except Exception as error:  # whatever a package raises that doesn't fit the others
            if shows_tracebacks():
                raise
            raise OnnxlrError(f"can't be started: {failure_line(error)}") from None
        if threading.current_thread() is threading.main_thread():
            # A stop asked for by a scheduler, or a terminal that goes, cleans up as Ctrl-C does.
            handle_end_signals(ctx.obj)
        return super().invoke(ctx)


class CommandGroup(click.Group):
    """The commands; a failure of any is told in one line, with the exit code of its kind."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        """Read the words of a command and run it."""
        ctx.obj = interrupt = Interrupt()  # what a command hears signals with
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
            # Methods, and what they call, may have ends of their own: they aren't the command's.
            if text := message_of(error):
                click.echo(f"onnxlr: {text}", err=True)
            ctx.exit(error.exit_code if isinstance(error, OnnxlrError) else 1)


def message_of(error: BaseException) -> str:
    """What the user is told of a failure; nothing where the reader of a pipe has gone."""
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
            from onnxlr.methods.registry import culprit

            method = culprit(error)
            return (
                f"internal error{f' in {method}' if method else ''} "
                f"({type(error).__name__}: {one_line(error)}): please report it"
                f"{' there, and choose others with --method' if method else ''}; "
                "ONNXLR_TRACEBACK=1 shows where"
            )
