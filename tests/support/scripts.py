"""Scripts run as ``python`` runs them, in this process: what they import is there already."""

import contextlib
import gc
import io
import runpy
import sys
import warnings
from collections.abc import Sequence

import pytest


def run_python(words: Sequence[str]) -> str:
    """Run ``python WORDS``, a file or ``-m MODULE`` with its arguments; what it prints.

    Raises
    ------
    Exception
        Whatever the script raises, and SystemExit with a code other than 0.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as they are no errors elsewhere either
        patch.setattr(sys, "path", ["", *sys.path])
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                if words[0] == "-m":
                    patch.setattr(sys, "argv", [words[1], *words[2:]])
                    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
                else:
                    patch.setattr(sys, "argv", list(words))
                    runpy.run_path(words[0], run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise
        gc.collect()  # files that it left open
        return out.getvalue()
