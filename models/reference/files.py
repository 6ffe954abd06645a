"""Reads named arrays with clear errors, and writes files whole or not at all."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

# What np.load raises of files that aren't .npz, and TypeError, since a lone array opens nothing.
_UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


class FileError(click.ClickException):
    """A file is missing or isn't what it should be; the message says which and gives a remedy."""


def read_arrays(path: Path, remedy: str, names: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file: those of `names`, or all.

    Raises FileError when the file can't be read or lacks one of `names`.
    """
    try:
        # Mapped files would stay open after an error; pickled arrays are refused by default.
        with path.open("rb") as file, np.load(file) as arrays:
            absent = [name for name in names if name not in arrays.files]
            if absent:
                raise FileError(f"{path} lacks the arrays {', '.join(absent)}; {remedy}.")
            return {name: arrays[name] for name in names or arrays.files}
    except FileNotFoundError as error:
        raise FileError(f"no file {path}; {remedy}.") from error
    except _UNREADABLE as error:
        raise FileError(
            f"{path} can't be read as .npz ({type(error).__name__}); {remedy}."
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, making its folder if need be; never leaves half a file.

    Raises FileError when it can't be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(
            f"{path} can't be written ({error.strerror}); make room or name another file."
        ) from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, making it and its folder if need be, in one write.

    Raises FileError when it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(f"{line}\n".encode())
    except OSError as error:
        raise FileError(
            f"{path} can't be written ({error.strerror}); make room or name another folder."
        ) from error


def tell_table(lines: Sequence[str], path: Path | None) -> None:
    """Print a Markdown table, and write it to a file if one is named."""
    shown = "\n".join(lines)
    click.echo(shown)
    if path is not None:
        replace_file(path, f"{shown}\n".encode())
