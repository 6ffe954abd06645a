"""Functions of the user's: imported by ``module:function``, and called apart from our output."""

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onnxlr.errors import UsageError, one_line

_ONE_CALL = threading.RLock()  # the standard output and the current folder are the process's


def import_function(text: str, flag: str) -> Callable[[Any], Any]:
    """The function that ``module:function`` names; modules of the working folder are seen.

    Parameters
    ----------
    text : str
    flag : str
        What it was given to, in messages.

    Raises
    ------
    UsageError
        If it can't be imported, or is no function.
    """
    module, _, name = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module of the user's may do anything
        raise UsageError(f"{flag} {text!r} can't be imported: {one_line(error)}") from None
    finally:
        os.chdir(here)
    if not callable(function):
        raise UsageError(f"{flag} {text!r} is not a function")
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def foreign_call() -> Iterator[None]:
    """Call what isn't ours: what it prints is no part of our output, its working folder not ours.

    One such call is made at a time.
    """
    with _ONE_CALL:
        here = Path.cwd()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            os.chdir(here)
