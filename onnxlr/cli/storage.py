"""What ``onnxlr cache`` does: the cache's entries counted by kind, shown, and removed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onnxlr.errors import OnnxlrError, OutputError
from onnxlr.system.cache import cache_is_off, cache_place
from onnxlr.system.entries import Entry, find_entries, remove

_NAME_ANOTHER = "name another folder with ONNXLR_CACHE"


@dataclass(frozen=True)
class CacheState:
    """The cache as it is found.

    Attributes
    ----------
    folder : Path or None
        None where nothing is kept.
    most_bytes : int
        Bytes that it may take.
    entries : sequence of Entry
    """

    folder: Path | None
    most_bytes: int
    entries: Sequence[Entry]

    @property
    def why_nothing_is_kept(self) -> str:
        """The line for a cache without a folder."""
        if cache_is_off():
            return "the cache is off: with ONNXLR_CACHE=off nothing is kept, shown or removed"
        return f"nothing is kept: this user has no home folder; {_NAME_ANOTHER}"


def look() -> CacheState:
    """The cache of this user and this environment.

    Raises
    ------
    UsageError
        If the environment names no size for it.
    OnnxlrError
        If its folder can't be listed.
    """
    folder, most_bytes = cache_place()
    try:
        return CacheState(folder, most_bytes, [] if folder is None else find_entries(folder))
    except OSError as error:
        raise OnnxlrError(
            f"can't list the cache in {folder}: {error.strerror or error}; {_NAME_ANOTHER}"
        ) from None


def clear(state: CacheState) -> Sequence[Entry]:
    """Remove all entries, and return them.

    Raises
    ------
    OutputError
        If some can't be removed; the others are.
    """
    failures = remove(state.entries)
    if failures:
        entry, error = failures[0]
        raise OutputError(
            f"can't remove {len(failures)} of the {len(state.entries)} entries in {state.folder}: "
            f"{entry.path.name}: {error.strerror or error}; make the folder writable, or "
            f"{_NAME_ANOTHER}"
        )
    return state.entries


def show_cache(console: Console, state: CacheState) -> None:
    """Print where the cache is, its size, and a row for each kind of entry."""
    if state.folder is None:
        console.print(state.why_nothing_is_kept)
        return
    kinds = _by_kind(state.entries)
    if kinds:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("kind")
        for column in ("entries", "size", "last used"):
            table.add_column(column, justify="right")
        for kind, entries in kinds.items():
            table.add_row(
                kind, f"{len(entries):,}", _size_words(_nbytes(entries)), _time_words(entries)
            )
        console.print(table)
        console.print()
    used = f", last used {_time_words(state.entries)}" if kinds else ""
    console.print(
        f"{state.folder}: {_count_words(state.entries)} of at most "
        f"{_size_words(state.most_bytes)}{used}"
    )


def show_removed(console: Console, state: CacheState, removed: Sequence[Entry]) -> None:
    """Print what was removed from the cache."""
    if state.folder is None:
        console.print(state.why_nothing_is_kept)
    else:
        console.print(f"{state.folder}: removed {_count_words(removed)}")


def cache_dict(state: CacheState, removed: Sequence[Entry] | None) -> dict[str, Any]:
    """The JSON form of the cache as it is now, with what was removed if it was cleared."""
    content: dict[str, Any] = {
        "folder": None if state.folder is None else str(state.folder),
        "bytes": _nbytes(state.entries),
        "limit_bytes": state.most_bytes,
        "entries": len(state.entries),
        "last_used": _iso_time(state.entries),
        "kinds": [
            {
                "kind": kind,
                "entries": len(entries),
                "bytes": _nbytes(entries),
                "last_used": _iso_time(entries),
            }
            for kind, entries in _by_kind(state.entries).items()
        ],
    }
    if removed is not None:
        content["removed"] = {"entries": len(removed), "bytes": _nbytes(removed)}
    return content


def _by_kind(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries of each kind, in alphabetical order."""
    kinds = sorted({entry.kind for entry in entries})
    return {kind: [entry for entry in entries if entry.kind == kind] for kind in kinds}


def _nbytes(entries: Sequence[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _count_words(entries: Sequence[Entry]) -> str:
    word = "entry" if len(entries) == 1 else "entries"
    return f"{len(entries):,} {word}, {_size_words(_nbytes(entries))}"


def _size_words(nbytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} B"


def _last_used(entries: Sequence[Entry]) -> datetime | None:
    """When the latest of some entries was used, in local time; a file's time may lie ahead."""
    if not entries:
        return None
    return datetime.fromtimestamp(min(time.time(), max(e.used for e in entries))).astimezone()


def _time_words(entries: Sequence[Entry]) -> str:
    used = _last_used(entries)
    return "" if used is None else f"{used:%Y-%m-%d %H:%M}"


def _iso_time(entries: Sequence[Entry]) -> str | None:
    used = _last_used(entries)
    return None if used is None else used.isoformat(timespec="seconds")
