"""How a finished model takes its place as OUT, with its external data beside it."""

import contextlib
import filecmp
import mmap
import os
import re
import stat
from pathlib import Path

from onnxlr.errors import OutputError
from onnxlr.system.files import write_failure

DATA_NAME_PATTERN = rb"weights-[0-9a-f]{16}\.data"


def move_into_place(path: Path, out: Path) -> None:
    """Move a finished model, its external data first, to where it belongs.

    Raises
    ------
    OutputError
        If it can't be moved, a data file of the same name and other content is in the way, or the
        folder it belongs to is elsewhere.
    """
    try:
        moves = []
        for extra in sorted(path.parent.rglob("*")):
            if extra != path and extra.is_file():
                target = out.parent / extra.relative_to(path.parent)
                if not target.parent.resolve().is_relative_to(out.parent.resolve()):
                    raise OutputError(
                        f"can't write {target}, the model's external data: {target.parent} leads "
                        "out of OUT's folder, where runtimes read none; choose another for OUT"
                    )
                if os.path.lexists(target) and _has(target, extra):
                    _open_to_all(target, extra)
                    continue  # the very weights are there already: IN's own, as a rule
                moves.append((extra, target))
        for extra, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            _move(extra, target)
        path.replace(out)
    except OSError as error:
        raise OutputError(write_failure(out, error)) from None


def _open_to_all(target: Path, extra: Path) -> None:
    """Let whoever may read OUT read weights made here before, under a mask that was stricter."""
    if re.fullmatch(DATA_NAME_PATTERN, os.fsencode(target.name)) is None:
        return
    mode, own = (stat.S_IMODE(path.stat().st_mode) for path in (extra, target))
    if mode & ~own:
        with contextlib.suppress(OSError):
            target.chmod(own | mode)


def _move(extra: Path, target: Path) -> None:
    """Move a file to where none of other content is: another run may put one there at any time."""
    try:
        target.hardlink_to(extra)
    except FileExistsError:
        if not _has(target, extra):
            extra.replace(target)  # in the place of a link to the same weights
            return
    except OSError:  # no hard links on this disk
        extra.replace(target)
        return
    extra.unlink()  # a data file with two names would be refused


def _has(target: Path, extra: Path) -> bool:
    """Whether a file of the same content is there; a link, of either kind, is refused by runtimes.

    Raises
    ------
    OutputError
        If another file is there.
    """
    if not target.exists() or not filecmp.cmp(extra, target, shallow=False):
        raise OutputError(
            f"can't write {target}, the model's external data: another file of that name is there; "
            "choose another folder for OUT"
        )
    return not target.is_symlink() and target.stat().st_nlink == 1


def unused_data_files(path: Path, out: Path) -> list[str]:
    """External data made here that the model at ``out`` has and the one that replaces it has not.

    They stay: another model may have them too.
    """
    names = sorted(_data_of(out) - _data_of(path))
    return [name for name in names if (out.parent / name).exists()]


def _data_of(model: Path) -> set[str]:
    """Names of data files made here that a model mentions."""
    if not model.is_file():
        return set()
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return {m.group().decode() for m in re.finditer(DATA_NAME_PATTERN, text)}
    except (OSError, ValueError):  # unreadable, or empty
        return set()
