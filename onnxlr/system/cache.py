"""The cache: results that runs leave for later runs, numbers as JSON and arrays as .npz files."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from onnxlr.errors import UsageError
from onnxlr.system.entries import (
    ArraysKind,
    RowsKind,
    beyond,
    find_entries,
    remove,
    remove_unfinished,
)
from onnxlr.system.files import read_json, replacement, write_json
from onnxlr.system.npz import read_npz
from onnxlr.version import __version__

ENTRY_POINTS = "onnxlr.passes"  # the group in which packages announce their passes
FOLDER_VARIABLE, SIZE_VARIABLE = "ONNXLR_CACHE", "ONNXLR_CACHE_SIZE"
_OFF = "off"  # value of the first that turns the cache off
MOST_BYTES = 10**9  # of all entries
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]B)", re.IGNORECASE | re.ASCII)
_NAMES = "names"  # the array that lists the names of the others
_KEPT = 0.9  # of the size, once room has to be made: not every write is to make it
# Of the room that was left, after which a run looks at the folder again: others write there too.
_UNSEEN = 0.125


class Cache:
    """Entries in a folder, each with a kind and a key.

    An entry that can't be read counts as absent, and one that can't be written is left out. Those
    that were used last stay within the size; the others make room.

    Parameters
    ----------
    folder : Path or None
        For None, nothing is kept.
    most_bytes : int
        Size of all entries together.

    Examples
    --------
    >>> cache = Cache(None)
    >>> cache.write("sensitivities", "key", {"conv1": 0.5})
    >>> cache.read("sensitivities", "key")
    {}
    """

    def __init__(self, folder: Path | None, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._unseen = 0.0  # bytes that may be written before the folder is looked at again

    def path(self, kind: RowsKind, key: str) -> Path | None:
        """The path of an entry's JSON file, which need not exist; None where nothing is kept.

        The entry counts as used now.
        """
        path = self._file(kind, key, ".json")
        if path is not None:
            _mark_used(path)
        return path

    def read(self, kind: RowsKind, key: str) -> dict[str, Any]:
        """The rows of an entry; empty if there is none, or if it was changed or damaged."""
        path = self.path(kind, key)
        entry = read_json(path) if path is not None else {}
        rows = entry.get("rows")
        return rows if isinstance(rows, dict) and entry.get("digest") == _digest(rows) else {}

    def write(self, kind: RowsKind, key: str, rows: Mapping[str, Any]) -> None:
        """Add rows to an entry in one step; rows that another run has added meanwhile stay."""
        if (path := self._file(kind, key, ".json")) is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                merged = self.read(kind, key) | dict(rows)
                write_json(path, {"digest": _digest(merged), "rows": merged})
                self._count(path)

    def read_arrays(self, kind: ArraysKind, key: str) -> dict[str, NDArray[Any]]:
        """The arrays of an entry; empty if there are none that can be read."""
        path = self._file(kind, key, ".npz")
        try:
            if path is None or not path.is_file():  # reading a pipe would wait for ever
                return {}
            numbered = read_npz(path)
            names = json.loads(numbered[_NAMES].tobytes())
            arrays = {name: numbered[str(i)] for i, name in enumerate(names)}
        except Exception:  # whatever zip, zlib and NumPy raise for a damaged file
            return {}
        _mark_used(path)
        return arrays

    def write_arrays(self, kind: ArraysKind, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace the arrays of an entry in one step, unless they take more than half the size."""
        path = self._file(kind, key, ".npz")
        if path is None or sum(a.nbytes for a in arrays.values()) > self._most_bytes // 2:
            return
        # Layers may have names that no member of an archive can have: arrays are numbered.
        numbered = {str(i): array for i, array in enumerate(arrays.values())}
        names = np.frombuffer(json.dumps(list(arrays)).encode(), np.uint8)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacement(path) as temporary, temporary.open("wb") as file:
                # NumPy below 2.1 would store its `allow_pickle` as one more array.
                np.savez(file, **{_NAMES: names}, **numbered)  # type: ignore[arg-type]
            self._count(path)

    def make_room(self) -> None:
        """Remove what killed runs left unfinished, and what the size has no room for.

        What can't be removed stays.
        """
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            remove_unfinished(self._folder)
            entries = find_entries(self._folder)
            total = sum(entry.nbytes for entry in entries)
            if total > self._most_bytes:
                last = beyond(entries, int(_KEPT * self._most_bytes))
                remove(last)
                total -= sum(entry.nbytes for entry in last)
            self._unseen = _UNSEEN * (self._most_bytes - total)

    def _file(self, kind: RowsKind | ArraysKind, key: str, ending: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{kind}-{key}{ending}"

    def _count(self, path: Path) -> None:
        """Count a file that was written, and make room where that may be needed."""
        self._unseen -= path.stat().st_size
        if self._unseen < 0:
            self.make_room()


def open_cache() -> Cache:
    """The cache in the folder and within the size of ``cache_place``.

    Raises
    ------
    UsageError
        If ``ONNXLR_CACHE_SIZE`` names no size.
    """
    cache = Cache(*cache_place())
    cache.make_room()  # the size may be smaller than it was
    return cache


def cache_place() -> tuple[Path | None, int]:
    """The folder of the cache, and the bytes that it may take.

    It is the user's cache folder, or what the environment's ``ONNXLR_CACHE`` names; None with
    ``ONNXLR_CACHE=off``, which keeps nothing. ``ONNXLR_CACHE_SIZE=500MB`` names another size.

    Raises
    ------
    UsageError
        If ``ONNXLR_CACHE_SIZE`` names no size.
    """
    text = os.environ.get(SIZE_VARIABLE, "")
    most_bytes = _size_of(text) if text else MOST_BYTES
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if cache_is_off():
        return None, most_bytes
    if folder:
        return Path(folder), most_bytes
    try:
        return Path(platformdirs.user_cache_dir("onnxlr", False)), most_bytes
    except RuntimeError:  # the user has no home folder
        return None, most_bytes


def cache_is_off() -> bool:
    """Whether the environment's ``ONNXLR_CACHE`` says that nothing is kept."""
    return os.environ.get(FOLDER_VARIABLE) == _OFF


def _size_of(text: str) -> int:
    """Bytes that a text such as 500MB or 1.5GB names."""
    if (size := _SIZE.fullmatch(text.strip())) is None:
        raise UsageError(
            f"{SIZE_VARIABLE}={text} is no size: give a number and its unit, such as 500MB or 2GB"
        )
    return int(float(size[1]) * _UNITS[size[2].upper()])


def key_of(*parts: object) -> str:
    """The key of an entry that depends on these values: a digest of 20 hexadecimal characters.

    It covers the ``repr`` of each value, and the versions of onnxlr and of every package that
    brings passes, since another version may factorize in another way.
    """
    text = repr((__version__, _pass_packages(), *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@functools.cache
def _pass_packages() -> tuple[tuple[str, str], ...]:
    """Names and versions of all packages that bring passes, except onnxlr itself."""
    dists = (entry.dist for entry in entry_points(group=ENTRY_POINTS))
    versions = {(dist.name, dist.version) for dist in dists if dist is not None}
    return tuple(sorted(pair for pair in versions if pair[0] != "onnxlr"))


def _digest(rows: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _mark_used(path: Path) -> None:
    """Set a file's time of last use, which it need not have: others' files can't be touched."""
    with contextlib.suppress(OSError):
        os.utime(path)
