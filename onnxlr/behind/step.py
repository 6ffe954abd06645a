"""A step that follows onnxlr: what ``--behind`` names, and how it is done to a file."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxlr.behind.ready import READY, Feeds
from onnxlr.errors import ModelError, UsageError, one_line
from onnxlr.system.user_function import foreign_call, import_function

Given = str | Callable[[str], Any]  # a name, module:function, or in Python the function itself


@dataclass(frozen=True)
class Behind:
    """What will be done to the file that is handed over, before it is used.

    Attributes
    ----------
    name : str
        One of ``READY``, or what the user's function is called.
    function : callable or None
        The user's: it takes the path of a model and gives the path of what it made of that.
    """

    name: str
    function: Callable[[str], Any] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def calibrates(self) -> bool:
        """Whether it has to see samples."""
        return self.function is None and READY[self.name].calibrates

    def apply(self, path: Path, label: str, feeds: Feeds) -> Path:
        """Do it to a model, which may be changed, and give the path of the model that it becomes.

        Parameters
        ----------
        path : Path
            A copy of the model for this alone, in a folder with nothing else than its data.
        label : str
            What messages call the model.
        feeds : callable
            Gives the feeds of the samples that it may see.

        Raises
        ------
        ModelError
            If it fails, or gives no path of a file.
        """
        try:
            with foreign_call():
                if self.function is None:
                    made = READY[self.name].make(path, feeds)
                else:
                    made = self.function(str(path))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a function of the user's may do anything
            raise ModelError(
                f"--behind {self.name} failed on {label}: {type(error).__name__}: {one_line(error)}"
            ) from None
        if isinstance(made, (str, os.PathLike)) and Path(made).is_file():
            return Path(made)
        raise ModelError(
            f"--behind {self.name} gave {made!r} for {label}: it must give the path of the model "
            "that it wrote"
        )


def parse_behind(given: Given | None) -> Behind | None:
    """The step that is named.

    Raises
    ------
    UsageError
        If the name is unknown, or the function can't be imported.

    Examples
    --------
    >>> parse_behind("int8-static").calibrates, parse_behind(None)
    (True, None)
    """
    if given is None:
        return None
    if callable(given):
        named = getattr(given, "func", given)  # of a functools.partial
        module, name = (getattr(named, key, None) for key in ("__module__", "__qualname__"))
        return Behind(f"{module}:{name}" if module and name else type(given).__name__, given)
    if isinstance(given, str) and ":" in given:
        return Behind(given, import_function(given, "--behind"))
    if given not in READY:
        raise UsageError(
            f"--behind {given!r} is unknown: choose from {', '.join(READY)} or module:function"
        )
    return Behind(given)
