"""Moves a finished model to OUT, and its external data beside it."""

import contextlib
import filecmp
import mmap
import os
import re
import stat
from pathlib import Path

from onnxlr.errors import OutputError
from onnxlr.model.external import DATA_NAME_PATTERN
from onnxlr.system.files import write_failure


def move_into_place(path: Path, out: Path) -> None:
    """Move a finished model to ``out``, its external data first.

    Raises
    ------
    OutputError
        If it can't be moved, if a data file of the same name and other content is in the way, or if
        the folder of a data file leads elsewhere.
    """
    try:
        moves = []
        for source in sorted(path.parent.rglob("*")):
            if source != path and source.is_file():
                target = out.parent / source.relative_to(path.parent)
                if not target.parent.resolve().is_relative_to(out.parent.resolve()):
                    raise OutputError(
                        f"can't write {target}, the model's external data: {target.parent} leads "
                        "out of OUT's folder, where runtimes read none; choose another for OUT"
                    )
                if os.path.lexists(target) and _is_same_file(source, target):
                    _add_permissions(source, target)
                    continue  # the same weights are there already, usually those of IN
                moves.append((source, target))
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            _move(source, target)
        path.replace(out)
    except OSError as error:
        raise OutputError(write_failure(out, error)) from None


def _add_permissions(source: Path, target: Path) -> None:
    """Add the source's permissions to a data file that onnxlr wrote earlier, under another umask.

    Whoever may read OUT must be able to read its weights.
    """
    if re.fullmatch(DATA_NAME_PATTERN, os.fsencode(target.name)) is None:
        return
    permissions, mode = (stat.S_IMODE(path.stat().st_mode) for path in (source, target))
    if permissions & ~mode:
        with contextlib.suppress(OSError):
            target.chmod(mode | permissions)


def _move(source: Path, target: Path) -> None:
    """Move a file without overwriting other content: another run may write there at any time."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        if not _is_same_file(source, target):
            source.replace(target)  # it replaces a link to the same weights
            return
    except OSError:  # no hard links on this disk
        source.replace(target)
        return
    source.unlink()  # a data file with two names would be refused by runtimes


def _is_same_file(source: Path, target: Path) -> bool:
    """Whether the target is a plain file of the same content; links are refused by runtimes.

    Raises
    ------
    OutputError
        If its content differs.
    """
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        raise OutputError(
            f"can't write {target}, the model's external data: another file of that name is there; "
            "choose another folder for OUT"
        )
    return not target.is_symlink() and target.stat().st_nlink == 1


def unused_data_files(path: Path, out: Path) -> list[str]:
    """Names of data files that the model at ``out`` uses and the one at ``path`` does not.

    Only those that onnxlr wrote are listed. They aren't deleted: another model may use them too.
    """
    names = sorted(_data_files_of(out) - _data_files_of(path))
    return [name for name in names if (out.parent / name).exists()]


def _data_files_of(model: Path) -> set[str]:
    """Names of the data files written by onnxlr that a model's file mentions."""
    if not model.is_file():
        return set()
    try:
        with (
            model.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return {m.group().decode() for m in re.finditer(DATA_NAME_PATTERN, content)}
    except (OSError, ValueError):  # unreadable, or empty
        return set()
