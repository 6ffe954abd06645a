"""The tree of everything onnxlr refuses, each with the exit code the command line ends with.

::

    OnnxlrError             1
    ├── ModelError          1   the model can't be read, checked or run
    │   └── CrashError      1   ... it crashes the runtime, or doesn't come to an end
    ├── DataError           1   the data can't be read or doesn't fit the model
    ├── RuntimeMissingError 1   ONNX Runtime or the execution provider asked for isn't there
    ├── ClusterError        1   the cluster asked for can't be reached, or can't do the work
    ├── OutputError         1   the result can't be written
    ├── UsageError          2   the request itself makes no sense
    └── BudgetError         3   the budget asked for can't be met within the accuracy allowed

Every message says what happened, with the values, and the remedy.
"""

from typing import ClassVar

_LONGEST = 1600  # characters of a message


class OnnxlrError(Exception):
    """The root: a failure with one clear line for the user."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(readable(str(message)))


class ModelError(OnnxlrError):
    """The model can't be read, checked or run."""


class CrashError(ModelError):
    """The model crashes the runtime, or doesn't come to an end in the time it is given."""


class DataError(OnnxlrError):
    """The data can't be read or doesn't fit the model."""


class RuntimeMissingError(OnnxlrError):
    """ONNX Runtime, or the execution provider asked for, isn't there."""


class ClusterError(OnnxlrError):
    """The cluster asked for can't be reached, or its workers can't do the work."""


class OutputError(OnnxlrError):
    """The result can't be written where it was asked for."""


class UsageError(OnnxlrError):
    """The request itself makes no sense."""

    exit_code = 2


class BudgetError(OnnxlrError):
    """The budget asked for can't be met within the accuracy allowed."""

    exit_code = 3


def readable(text: str) -> str:
    """A message on one line: no control characters, and the middle left out of what is endless.

    Names in a file may hold anything.

    >>> readable("the weight w\\n\\x1b[31m")
    'the weight w \\\\x1b[31m'
    """
    text = text.replace("\n", " ").strip()
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: object) -> str:
    """The first informative line of an error, cut to a readable length."""
    try:
        said = str(error)
    except Exception:  # of a metric's own making
        said = ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
