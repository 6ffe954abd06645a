"""Writing results: whole or not at all, beside where they belong."""

import contextlib
import errno
import filecmp
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
    held = [v for g in all_graphs(model) for v in g.initializers.values()]
    tensors = [v.const_value for v in held if v.const_value is not None]
    if sum(t.nbytes for t in tensors) > PROTOBUF_LIMIT - (64 << 20):
        data = f"{path.name}.data"
        ir.save(model, path, external_data=data)
        return path.stat().st_size + (path.parent / data).stat().st_size
    # What IN keeps in files of its own goes into OUT, which is then whole by itself.
    ir.external_data.load_to_model(model)
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


def check_destination(out: Path, *sources: str | os.PathLike[str] | None) -> None:
    """Refuse an output path that can't work, before the long work begins.

    Raises
    ------
    UsageError
        If it is one of the files that are read.
    OutputError
        If its folder is missing or not writable, or it is something other than a file.
    """
    try:
        if out.is_dir():
            raise OutputError(f"OUT {out} is a folder: name a file in it")
        given = [Path(source) for source in sources if source is not None]
        for source in given if out.exists() else ():
            if source.exists() and out.samefile(source):
                raise UsageError(
                    f"{out} is the same file as the input {source}: name another output"
                )
        if out.exists() and not out.is_file():
            raise OutputError(f"OUT {out} is not a regular file: name another")
        if not out.parent.is_dir():
            raise OutputError(
                f"can't write {out}: its folder {out.parent} doesn't exist, create it first"
            )
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
    """Move a finished model, its external data first, to where it belongs.

    Raises
    ------
    OutputError
        If it can't be moved, or a data file of the same name and other content is in the way.
    """
    try:
        moves = []
        for extra in sorted(path.parent.rglob("*")):
            if extra != path and extra.is_file():
                target = out.parent / extra.relative_to(path.parent)
                if target.exists() and filecmp.cmp(extra, target, shallow=False):
                    continue  # the very weights are there already: IN's own, as a rule
                if target.exists() and target.name != f"{out.name}.data":
                    raise OutputError(
                        f"can't write {target}, the model's external data: another file of that "
                        "name is there; choose another folder for OUT"
                    )
                moves.append((extra, target))
        for extra, target in moves:
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
            return path, path.write_bytes(source.data or b"")
        shutil.copyfile(source.path, path)
        for location in source.external:
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path.parent / location, folder / location)
    except OSError as error:
        raise OutputError(write_failure(path, error)) from None
    return path, source.nbytes


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises
    ------
    OutputError
        If it can't be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(write_failure(path, error)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its place when all went well, and goes when not.

    Raises
    ------
    OSError
        If it can't.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".onnxlr-")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
