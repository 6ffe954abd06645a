"""What runs leave behind for the next one: numbers as JSON, and arrays, in a folder."""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from onnxlr.system.files import TEMPORARY_PREFIX, replacement
from onnxlr.system.npz import read_npz
from onnxlr.version import __version__

ENTRY_POINTS = "onnxlr.passes"  # where packages announce what they bring
FOLDER_VARIABLE = "ONNXLR_CACHE"
_NAMES = "names"
OFF = "off"
_OWN = re.compile(r"[a-z]+-[0-9a-f]{20}\.npz")  # a folder that is named may hold other files too
_ABANDONED = 3600.0  # seconds after which a file that was begun won't be finished
MOST_BYTES = 2 << 30  # of arrays: those not asked for the longest go first


class Cache:
    """Entries by kind and key in a folder. A cache: what can't be read or written is done without.

    Parameters
    ----------
    folder : Path or None
        None keeps nothing.

    Examples
    --------
    >>> cache = Cache(None)
    >>> cache.write("sensitivities", "key", {"conv1": 0.5})
    >>> cache.read("sensitivities", "key")
    {}
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def path(self, kind: str, key: str) -> Path | None:
        """The JSON file of an entry, which need not exist; None where nothing is kept."""
        return None if self._folder is None else self._folder / f"{kind}-{key}.json"

    def read(self, kind: str, key: str) -> dict[str, Any]:
        """The rows of an entry; empty if there is none that is as it was written."""
        path = self.path(kind, key)
        found = read_json(path) if path is not None else {}
        rows = found.get("rows")
        return rows if isinstance(rows, dict) and found.get("digest") == _digest(rows) else {}

    def write(self, kind: str, key: str, rows: Mapping[str, Any]) -> None:
        """Add rows to an entry in one step: those that another run has added meanwhile stay."""
        if (path := self.path(kind, key)) is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                whole = self.read(kind, key) | dict(rows)
                write_json(path, {"digest": _digest(whole), "rows": whole})

    def read_arrays(self, kind: str, key: str) -> dict[str, NDArray[Any]]:
        """The arrays of an entry; empty if there are none that can be read."""
        if self._folder is None:
            return {}
        path = self._folder / f"{kind}-{key}.npz"
        try:
            if not path.is_file():  # a pipe would be waited for
                return {}
            found = read_npz(path)
            path.touch()
            names = json.loads(found[_NAMES].tobytes())
            found = {name: found[str(i)] for i, name in enumerate(names)}
        except Exception:  # whatever zip, zlib and NumPy trip over in a file that was damaged
            return {}
        return found

    def write_arrays(self, kind: str, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace the arrays of an entry in one step, and keep the folder within its size."""
        size = sum(a.nbytes for a in arrays.values())
        if self._folder is None or size > MOST_BYTES // 2:
            return
        path = self._folder / f"{kind}-{key}.npz"
        # Names of layers may be what no name in an archive can be.
        numbered = {str(i): array for i, array in enumerate(arrays.values())}
        names = np.frombuffer(json.dumps(list(arrays)).encode(), np.uint8)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacement(path) as temporary, temporary.open("wb") as file:
                # NumPy below 2.1 would store its `allow_pickle` as one more array.
                np.savez(file, **{_NAMES: names}, **numbered)  # type: ignore[arg-type]
            _trim(self._folder)


def open_cache() -> Cache:
    """The user's cache folder, or the one that the environment's ``ONNXLR_CACHE`` names.

    ``ONNXLR_CACHE=off`` keeps nothing.
    """
    named = os.environ.get(FOLDER_VARIABLE, "")
    if named == OFF:
        return Cache(None)
    if named:
        return Cache(Path(named))
    try:
        return Cache(Path(platformdirs.user_cache_dir("onnxlr", False)))
    except RuntimeError:  # nobody has a home here
        return Cache(None)


def key_of(*parts: object) -> str:
    """A short digest of what an entry depends on: these values, by their ``repr``, and versions.

    Those of onnxlr, and of every package that brings passes: another version may factorize in
    another way.
    """
    return hashlib.sha256(repr((__version__, _others(), *parts)).encode()).hexdigest()[:20]


@cache
def _others() -> tuple[tuple[str, str], ...]:
    """Names and versions of all that brings passes but onnxlr itself."""
    found = (entry.dist for entry in entry_points(group=ENTRY_POINTS))
    named = {(dist.name, dist.version) for dist in found if dist is not None}
    return tuple(sorted(pair for pair in named if pair[0] != "onnxlr"))


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty if it holds none."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, entry: Mapping[str, Any]) -> None:
    """Replace a file in one step.

    Raises
    ------
    OSError
        If it can't be written.
    """
    with replacement(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def _digest(rows: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _trim(folder: Path) -> None:
    for abandoned in folder.glob(f"{TEMPORARY_PREFIX}*"):  # by a run that was killed
        with contextlib.suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > _ABANDONED:
                abandoned.unlink()
    own = [path for path in folder.glob("*.npz") if _OWN.fullmatch(path.name)]
    files = sorted(own, key=lambda p: p.stat().st_mtime, reverse=True)
    held = 0
    for file in files:
        held += file.stat().st_size
        if held > MOST_BYTES:
            file.unlink(missing_ok=True)
