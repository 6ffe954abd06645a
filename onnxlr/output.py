"""Writing results: whole or not at all, beside where they belong."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from onnxlr.errors import OutputError, UsageError
from onnxlr.model import PROTOBUF_LIMIT, Source, all_graphs, serialize, to_proto


def save(model: ir.Model, path: Path) -> int:
    """Write a model to a new file and return the bytes written; external data past 2 GB.

    Raises
    ------
    OutputError
        If the file can't be written; what was begun is removed.
    """
    try:
        return _save(model, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OutputError(write_failure(path, error)) from None


def _save(model: ir.Model, path: Path) -> int:
    weights = sum(
        v.const_value.nbytes
        for g in all_graphs(model)
        for v in g.initializers.values()
        if v.const_value is not None
    )
    if weights > PROTOBUF_LIMIT - (64 << 20):
        data = f"{path.name}.data"
        ir.save(model, path, external_data=data)
        return path.stat().st_size + (path.parent / data).stat().st_size
    blob = serialize(to_proto(model), str(path))
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    return len(blob)


def write_failure(path: Path, error: OSError) -> str:
    """The line for an operating system error on writing."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{path}: the disk is full or the file size limit is reached; free some space"
    return f"can't write {path}: {error.strerror or error}; choose another place"


def check_destination(out: Path, source: Path | None) -> None:
    """Refuse an output path that can't work, before the long work begins.

    Raises
    ------
    UsageError
        If it is the input itself.
    OutputError
        If its folder is missing or not writable, or it is something other than a file.
    """
    if out.is_dir():
        raise OutputError(f"OUT {out} is a folder: name a file in it")
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"IN and OUT are the same file ({out}): name another OUT")
    if out.exists() and not out.is_file():
        raise OutputError(f"OUT {out} is not a regular file: name another")
    if not out.parent.is_dir():
        raise OutputError(f"OUT's folder {out.parent} doesn't exist: create it first")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OutputError(write_failure(out, error)) from None


@contextlib.contextmanager
def workspace(out: Path | None) -> Iterator[Path]:
    """A temporary folder beside the output, so that the last step is a rename.

    Raises
    ------
    OutputError
        If it can't be made.
    """
    parent = None if out is None else out.parent
    try:
        folder = tempfile.TemporaryDirectory(prefix=".onnxlr-", dir=parent)
    except OSError as error:
        raise OutputError(write_failure(out or Path(tempfile.gettempdir()), error)) from None
    with folder as name:
        yield Path(name)


def place(path: Path, out: Path) -> None:
    """Move a finished model, its external data first, to where it belongs."""
    try:
        for extra in sorted(path.parent.rglob("*")):
            if extra != path and extra.is_file():
                target = out.parent / extra.relative_to(path.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                extra.replace(target)
        path.replace(out)
    except OSError as error:
        raise OutputError(write_failure(out, error)) from None


def copy_source(source: Source, folder: Path, name: str) -> tuple[Path, int]:
    """The original, byte for byte, with its external data."""
    path = folder / name
    try:
        if source.path is None:
            return path, save(source.model, path)
        shutil.copyfile(source.path, path)
        for location in source.external:
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path.parent / location, folder / location)
    except OSError as error:
        raise OutputError(write_failure(path, error)) from None
    return path, source.nbytes
