"""Checks of output paths: they are writable, distinct, and none of the files that are read."""

import os
import re
import tempfile
from pathlib import Path

from onnxlr.errors import OutputError, UsageError
from onnxlr.model.external import DATA_NAME_PATTERN
from onnxlr.model.load import Source, check_name
from onnxlr.system.files import write_failure


def check_destination(out: Path, *sources: str | os.PathLike[str] | None) -> None:
    """Refuse an output path that can't be written, before the long work begins.

    Parameters
    ----------
    out : Path
    *sources : path or None
        The files and folders that are read.

    Raises
    ------
    UsageError
        If it is one of the files that are read.
    OutputError
        If its folder is missing or not writable, or if something other than a file is there.
    ModelError
        If the path isn't text.
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
        inputs = [Path(source) for source in sources if source is not None]
        for source in inputs if out.exists() else ():
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
    """Whether a path is /dev/stdout or its like: a link that no file must replace."""
    target = path.readlink() if path.is_symlink() else path
    folders = (str(path.parent.resolve()), str(target.parent))
    return any(re.fullmatch(r"/proc/(self|\d+)/fd", folder) for folder in folders)


def check_distinct(*outputs: Path) -> None:
    """Refuse one file for two outputs.

    Raises
    ------
    UsageError
        If two are in the same folder, however that is written, and their names differ at most in
        upper and lower case, which some disks don't tell apart.
    """
    keys = [_file_key(path) for path in outputs]
    for path, key in zip(outputs, keys, strict=True):
        if keys.count(key) > 1:
            raise UsageError(f"{path} is named for two outputs: name another")


def _file_key(path: Path) -> tuple[object, ...]:
    """The folder and the name of a file, the same for all ways to write its path."""
    try:
        resolved = path.resolve() if path.exists() else path.parent.resolve() / path.name
        folder = resolved.parent.stat()
    except (OSError, RuntimeError):  # no such folder, or circular links: reported elsewhere
        return (path.absolute(),)
    return folder.st_dev, folder.st_ino, resolved.name.casefold()


def check_external(path: Path, source: Source, out: Path | None) -> None:
    """Refuse an output path that is an external data file of IN, or may become one of OUT.

    Parameters
    ----------
    path : Path
        The path of another output.
    source : Source
        IN.
    out : Path or None
        OUT.

    Raises
    ------
    UsageError
        If it is such a file.
    """
    if source.path is not None:
        check_destination(path, *(source.path.parent / name for name in source.external))
    if out is None:
        return
    key, folder = _file_key(path), out.parent
    is_data_name = re.fullmatch(DATA_NAME_PATTERN, os.fsencode(path.name))
    is_data_file = is_data_name and key == _file_key(folder / path.name)
    for name in source.external:
        data_keys = _file_key(folder / name), _file_key(folder / Path(name).parts[0])
        if is_data_file or key in data_keys:
            raise UsageError(
                f"{path} has a name that the external data of {out} may need: name another output"
            )
