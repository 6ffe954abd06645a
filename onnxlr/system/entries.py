"""The files of a cache: which of a folder's files are entries, and which of them make room."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from onnxlr.system.files import TEMPORARY_NAME

RowsKind = Literal["candidates", "latency", "sensitivities"]
ArraysKind = Literal["factors", "spectra", "statistics"]
ENGINES = "engines"  # folders, each with what a provider compiled of one model

# Only what has such a name is counted and deleted: the folder may be the user's, and hold others.
_ENTRY_NAME = re.compile(
    rf"(?:(?P<rows>{'|'.join(get_args(RowsKind))})-[0-9a-f]{{20}}\.json"
    rf"|(?P<arrays>{'|'.join(get_args(ArraysKind))})-[0-9a-f]{{20}}\.npz"
    rf"|(?P<folders>{ENGINES})-[0-9a-f]{{20}})"
)
_ABANDONED_SECONDS = 3600.0  # after which an unfinished file won't be finished


@dataclass(frozen=True)
class Entry:
    """A file of the cache, or a folder of engines.

    Attributes
    ----------
    path : Path
    kind : str
        What is in it, such as ``statistics``.
    nbytes : int
    used : float
        When it was last read or written, in seconds since 1970.
    """

    path: Path
    kind: str
    nbytes: int
    used: float


def find_entries(folder: Path) -> list[Entry]:
    """The entries in a folder, those that were used last first; none if there is no such folder.

    Raises
    ------
    OSError
        If the folder can't be listed, or is none.
    """
    entries = []
    for file, name in _files(folder, _ENTRY_NAME):
        with contextlib.suppress(OSError):  # another run has removed it meanwhile
            status = file.stat(follow_symlinks=False)
            kind = name["rows"] or name["arrays"] or ENGINES
            nbytes = status.st_size if kind != ENGINES else _size_inside(Path(file.path))
            entries.append(Entry(Path(file.path), kind, nbytes, status.st_mtime))
    return sorted(entries, key=lambda e: (-e.used, e.path.name))


def _files(
    folder: Path, form: re.Pattern[str]
) -> Iterator[tuple["os.DirEntry[str]", re.Match[str]]]:
    """The files in a folder whose names have this form, and folders of engines, with the match."""
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(os.scandir(folder))
        except FileNotFoundError:
            return
        for file in files:
            name = form.fullmatch(file.name)
            if name is None:
                continue
            kind_of = file.is_dir if name.groupdict().get("folders") else file.is_file
            if kind_of(follow_symlinks=False):
                yield file, name


def _size_inside(folder: Path) -> int:
    return sum(path.stat(follow_symlinks=False).st_size for path in folder.rglob("*"))


def beyond(entries: Iterable[Entry], most_bytes: int) -> list[Entry]:
    """Those of some entries, in the order of ``find_entries``, that don't fit into so many bytes.

    An entry goes before all that were used after it.
    """
    total, last = 0, []
    for entry in entries:
        total += entry.nbytes
        if total > most_bytes:
            last.append(entry)
    return last


def remove(entries: Sequence[Entry]) -> list[tuple[Entry, OSError]]:
    """Remove entries, also while others read them; returns those that can't be, and why."""
    failures = []
    for entry in entries:
        try:
            if entry.kind == ENGINES:
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink(missing_ok=True)
        except OSError as error:
            failures.append((entry, error))
    return failures


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs have begun to write, once nobody can be writing it any more.

    Raises
    ------
    OSError
        If the folder can't be listed, or is none.
    """
    for file, _ in _files(folder, TEMPORARY_NAME):
        with contextlib.suppress(OSError):
            if time.time() - file.stat(follow_symlinks=False).st_mtime > _ABANDONED_SECONDS:
                Path(file.path).unlink()
