"""The cache: results that runs leave for later runs, numbers as JSON and arrays as .npz files."""

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from onnxlr.system.files import TEMPORARY_PREFIX, read_json, replacement, write_json
from onnxlr.system.npz import read_npz
from onnxlr.version import __version__

ENTRY_POINTS = "onnxlr.passes"  # the group in which packages announce their passes
FOLDER_VARIABLE = "ONNXLR_CACHE"
OFF = "off"  # value of the variable that turns the cache off
MOST_BYTES = 2 << 30  # of arrays: those that weren't read for the longest time go first
_NAMES = "names"  # the array that lists the names of the others
# The cache deletes only files of this form: the folder may be the user's and hold other files.
_ENTRY_FILE = re.compile(r"[a-z]+-[0-9a-f]{20}\.npz")
_ABANDONED_SECONDS = 3600.0  # after which an unfinished file won't be finished


class Cache:
    """Entries in a folder, each with a kind and a key.

    An entry that can't be read counts as absent, and one that can't be written is left out.

    Parameters
    ----------
    folder : Path or None
        For None, nothing is kept.
    most_bytes : int
        Bytes of all arrays together.

    Examples
    --------
    >>> cache = Cache(None)
    >>> cache.write("sensitivities", "key", {"conv1": 0.5})
    >>> cache.read("sensitivities", "key")
    {}
    """

    def __init__(self, folder: Path | None, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._most_bytes = folder, most_bytes

    def path(self, kind: str, key: str) -> Path | None:
        """The path of an entry's JSON file, which need not exist; None where nothing is kept."""
        return None if self._folder is None else self._folder / f"{kind}-{key}.json"

    def read(self, kind: str, key: str) -> dict[str, Any]:
        """The rows of an entry; empty if there is none, or if it was changed or damaged."""
        path = self.path(kind, key)
        entry = read_json(path) if path is not None else {}
        rows = entry.get("rows")
        return rows if isinstance(rows, dict) and entry.get("digest") == _digest(rows) else {}

    def write(self, kind: str, key: str, rows: Mapping[str, Any]) -> None:
        """Add rows to an entry in one step; rows that another run has added meanwhile stay."""
        if (path := self.path(kind, key)) is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                merged = self.read(kind, key) | dict(rows)
                write_json(path, {"digest": _digest(merged), "rows": merged})

    def read_arrays(self, kind: str, key: str) -> dict[str, NDArray[Any]]:
        """The arrays of an entry; empty if there are none that can be read."""
        if self._folder is None:
            return {}
        path = self._folder / f"{kind}-{key}.npz"
        try:
            if not path.is_file():  # reading a pipe would wait for ever
                return {}
            numbered = read_npz(path)
            path.touch()
            names = json.loads(numbered[_NAMES].tobytes())
            arrays = {name: numbered[str(i)] for i, name in enumerate(names)}
        except Exception:  # whatever zip, zlib and NumPy raise for a damaged file
            return {}
        return arrays

    def write_arrays(self, kind: str, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace the arrays of an entry in one step, and keep the folder within its size."""
        size = sum(a.nbytes for a in arrays.values())
        if self._folder is None or size > self._most_bytes // 2:
            return
        path = self._folder / f"{kind}-{key}.npz"
        # Layers may have names that no member of an archive can have: arrays are numbered.
        numbered = {str(i): array for i, array in enumerate(arrays.values())}
        names = np.frombuffer(json.dumps(list(arrays)).encode(), np.uint8)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacement(path) as temporary, temporary.open("wb") as file:
                # NumPy below 2.1 would store its `allow_pickle` as one more array.
                np.savez(file, **{_NAMES: names}, **numbered)  # type: ignore[arg-type]
            _trim(self._folder, self._most_bytes)


def open_cache() -> Cache:
    """A cache in the user's cache folder, or where the environment's ``ONNXLR_CACHE`` says.

    With ``ONNXLR_CACHE=off`` nothing is kept.
    """
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if folder == OFF:
        return Cache(None)
    if folder:
        return Cache(Path(folder))
    try:
        return Cache(Path(platformdirs.user_cache_dir("onnxlr", False)))
    except RuntimeError:  # the user has no home folder
        return Cache(None)


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


def _trim(folder: Path, most_bytes: int) -> None:
    """Delete unfinished files of killed runs, and the oldest arrays beyond ``most_bytes``."""
    for temporary in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat().st_mtime > _ABANDONED_SECONDS:
                temporary.unlink()
    entries = [path for path in folder.glob("*.npz") if _ENTRY_FILE.fullmatch(path.name)]
    files = sorted(entries, key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > most_bytes:
            file.unlink(missing_ok=True)
