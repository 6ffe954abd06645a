"""Where results may go: no file that is read, none that is named twice, all of them writable."""

import os
import re
import tempfile
from pathlib import Path

from onnxlr.errors import OutputError, UsageError
from onnxlr.model.load import Source, check_name
from onnxlr.model.place import DATA_NAME_PATTERN
from onnxlr.system.files import write_failure


def check_destination(out: Path, *sources: str | os.PathLike[str] | None) -> None:
    """Refuse an output path that can't work, before the long work begins.

    Raises
    ------
    UsageError
        If it is one of the files that are read.
    OutputError
        If its folder is missing or not writable, or it is something other than a file.
    ModelError
        If its path isn't text.
    """
    check_name(out)
    try:
        if out.is_dir():
            raise OutputError(f"{out} is a folder: name a file in it")
        if _is_stream(out):
            raise UsageError(
                f"{out} is a link to an open file of this process, which can't be replaced: name "
                "a file (or - for --json, which prints)"
            )
        given = [Path(source) for source in sources if source is not None]
        for source in given if out.exists() else ():
            if source.exists() and out.samefile(source):
                raise UsageError(
                    f"{out} is the same file as the input {source}: name another output"
                )
            for sample in source.glob("*.np[yz]") if source.is_dir() else ():
                if sample.exists() and out.samefile(sample):
                    raise UsageError(
                        f"{out} is one of the samples in {source}: name another output"
                    )
        if out.exists() and not out.is_file():
            raise OutputError(f"{out} is not a regular file: name another")
        if not out.parent.is_dir():
            raise OutputError(
                f"can't write {out}: its folder {out.parent} doesn't exist, create it first"
            )
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OutputError(write_failure(out, error)) from None


def path_exists(path: Path) -> bool:
    """Whether there is something at a path; not where its name is none that a disk takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _is_stream(path: Path) -> bool:
    """Whether a path is /dev/stdout or its like: a link whose place no file must take."""
    target = path.readlink() if path.is_symlink() else path
    places = (str(path.parent.resolve()), str(target.parent))
    return any(re.fullmatch(r"/proc/(self|\d+)/fd", place) for place in places)


def check_distinct(*outputs: Path) -> None:
    """Refuse one file for two outputs.

    Raises
    ------
    UsageError
        If two are in one folder, by whatever way, and have names that some disks take for the same.
    """
    places = [_place(path) for path in outputs]
    for path, place in zip(outputs, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{path} is named for two outputs: name another")


def _place(path: Path) -> tuple[object, ...]:
    """Where a file is to be, however it is called."""
    try:
        whole = path.resolve() if path.exists() else path.parent.resolve() / path.name
        folder = whole.parent.stat()
    except (OSError, RuntimeError):  # there is none, or links go round: it is told elsewhere
        return (path.absolute(),)
    return folder.st_dev, folder.st_ino, whole.name.casefold()


def check_external(path: Path, source: Source, out: Path | None) -> None:
    """Refuse an output that is one of the files in which a model keeps its weights, or OUT will.

    Raises
    ------
    UsageError
        If it is one of IN's, or has the place that one of OUT's may have to take.
    """
    if source.path is not None:
        check_destination(path, *(source.path.parent / name for name in source.external))
    if out is None:
        return
    place, beside = _place(path), out.parent
    made_here = re.fullmatch(DATA_NAME_PATTERN, os.fsencode(path.name)) and place == _place(
        beside / path.name
    )
    for name in source.external:
        taken = _place(beside / name), _place(beside / Path(name).parts[0])
        if made_here or place in taken:
            raise UsageError(
                f"{path} is called as external data that may have to go beside {out}: name another "
                "output"
            )
