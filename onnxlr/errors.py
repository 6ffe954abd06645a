"""The errors that onnxlr raises, and the exit codes that the command ends with for them.

::

    OnnxlrError             1
    ├── ModelError          1   the model can't be read, checked or run
    │   └── CrashError      1   ... it crashes ONNX Runtime, or doesn't come to an end
    ├── DataError           1   the data can't be read or doesn't fit the model
    ├── RuntimeMissingError 1   ONNX Runtime or the requested execution provider isn't there
    ├── ClusterError        1   the cluster can't be reached, or can't do the work
    ├── OutputError         1   the result can't be written
    ├── UsageError          2   the request itself makes no sense
    └── BudgetError         3   the budget can't be met within the allowed loss of quality

Every message says what happened, with the values, and what to do about it.
"""

from typing import ClassVar

_MOST_CHARACTERS = 1600  # of a message
_MOST_OF_A_LINE = 300  # characters of another library's message


class OnnxlrError(Exception):
    """The base class: an error with one clear line for the user."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(readable(str(message)))


class ModelError(OnnxlrError):
    """The model can't be read, checked or run."""


class CrashError(ModelError):
    """The model crashes ONNX Runtime, or doesn't come to an end in time."""


class DataError(OnnxlrError):
    """The data can't be read or doesn't fit the model."""


class RuntimeMissingError(OnnxlrError):
    """ONNX Runtime, or the requested execution provider, isn't there."""


class ClusterError(OnnxlrError):
    """The cluster can't be reached, or its workers can't do the work."""


class OutputError(OnnxlrError):
    """The result can't be written to the requested path."""


class UsageError(OnnxlrError):
    """The request itself makes no sense."""

    exit_code = 2


class BudgetError(OnnxlrError):
    """The budget can't be met within the allowed loss of quality."""

    exit_code = 3


def readable(text: str) -> str:
    """A message on one line, without control characters, and shortened in the middle if very long.

    Names in a model's file may contain anything.

    >>> readable("the weight w\\n\\x1b[31m")
    'the weight w \\\\x1b[31m'
    """
    text = text.replace("\n", " ").strip()
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[: _MOST_CHARACTERS // 2]} … {text[-_MOST_CHARACTERS // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: object) -> str:
    """The first line of an error's message that isn't empty, cut to 300 characters.

    An error without a message gives the name of its class.
    """
    try:
        message = str(error)
    except Exception:  # an error of a user's metric may fail to print
        message = ""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _MOST_OF_A_LINE else f"{text[: _MOST_OF_A_LINE - 3]}..."
