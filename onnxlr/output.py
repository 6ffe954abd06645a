"""Writing results: whole or not at all, beside where they belong."""

import contextlib
import errno
import filecmp
import hashlib
import itertools
import mmap
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from onnxlr.errors import OutputError
from onnxlr.model import Source, all_graphs, check_unchanged, serialize, to_proto
from onnxlr.sanity import PROTOBUF_LIMIT

TEMPORARY = ".onnxlr-"  # what files are called that are being written
_WORKSPACE, _OWNER = ".onnxlr-run-", "owner"
_DATA = "weights-"  # what external data made here are called, with their digest and .data
DATA_NAME = rb"weights-[0-9a-f]{16}\.data"
_STEM = 50  # characters of a name that are told
_OUTSIDE_FROM = 1024  # bytes; what is smaller stays in the model's own file


def save(model: ir.Model, path: Path, *, outside: bool = False) -> int:
    """Write a model to a new file and return the bytes written.

    Parameters
    ----------
    model : onnx_ir.Model
        Its tensors are those of the data file afterwards, if there is one.
    path : Path
    outside : bool
        Whether weights go into a data file beside it, one after the other, so that no more than one
        is held; past 2 GB they do in any case.

    Raises
    ------
    OutputError
        If the file can't be written; what was begun is removed.
    """
    try:
        held = [v for g in all_graphs(model) for v in g.initializers.values()]
        stored = sum(v.const_value.nbytes for v in held if v.const_value is not None)
        outside = outside or stored > PROTOBUF_LIMIT - (64 << 20)
        nbytes = _write_data(model, path.parent) if outside else 0
        return nbytes + _write(path, serialize(to_proto(model), str(path)))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OutputError(write_failure(path, error)) from None


def _write_data(model: ir.Model, folder: Path) -> int:
    """Write the weights into one file beside the model, and let the model refer to it.

    The file is named by its content: a model and the data of another never come together, whatever
    ends or runs at the same time, and the same plan gives the same bytes under any name.
    """
    for old in folder.glob(f"{_DATA}*"):  # of the build before, which is this one's to replace
        old.unlink()
    passing = folder / f"{_DATA}passing"
    ir.external_data.unload_from_model(
        model, folder, passing.name, size_threshold_bytes=_OUTSIDE_FROM
    )
    values = [v for g in all_graphs(model) for v in g.initializers.values()]
    moved = [
        (value, tensor)
        for value in values
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    ]
    if not moved:
        passing.unlink(missing_ok=True)
        return 0
    with passing.open("rb+") as file:
        os.fsync(file.fileno())
        content = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{_DATA}{content[:16]}.data"
    nbytes = passing.stat().st_size
    with contextlib.suppress(OSError):  # some disks know no permissions
        passing.chmod(_usual_mode(folder))
    passing.rename(folder / name)
    for value, tensor in moved:
        value.const_value = ir.ExternalTensor(
            name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=folder,
        )
    return nbytes


def _write(path: Path, blob: bytes) -> int:
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


@contextlib.contextmanager
def workspace(out: Path | None) -> Iterator[Path]:
    """A temporary folder beside the output, so that the last step is a rename.

    Folders that runs left behind which were killed are removed.

    Raises
    ------
    OutputError
        If it can't be made.
    """
    parent = Path(tempfile.gettempdir()) if out is None else out.parent
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_own_folder(parent))
            inner = folder / "model"
            inner.mkdir()
        except OSError as error:
            raise OutputError(write_failure(out or parent, error)) from None
        yield inner


@contextlib.contextmanager
def scratch(parent: Path | None, prefix: str) -> Iterator[Path]:
    """A folder that is gone afterwards, as far as what it lies in lets go of it.

    Raises
    ------
    OSError
        If it can't be made.
    """
    folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        with contextlib.suppress(RecursionError):  # Python's way to give up on what may not go
            folder.cleanup()


@contextlib.contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A folder of a living process, by a lock, which ends with it; those of dead ones are removed.

    Raises
    ------
    OSError
        If it can't be made.
    """
    _remove_abandoned(parent)
    with scratch(parent, _WORKSPACE) as folder:
        unclaimed = folder / "claim"
        with unclaimed.open("wb") as file:
            _lock(file)
            unclaimed.rename(folder / _OWNER)  # locked by the time it can be found
            yield folder


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of runs that are no more: nobody holds their lock."""
    for folder in parent.glob(f"{_WORKSPACE}*"):
        with contextlib.suppress(OSError), (folder / _OWNER).open("rb+") as file:
            ours = os.fstat(file.fileno()).st_size == 0  # else somebody's weights, say
            if ours and _lock(file):
                shutil.rmtree(folder, ignore_errors=True)


def _lock(file: BinaryIO) -> bool:
    """Take the lock of a file; False where another process has it, or there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing is taken for abandoned there
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def name_within(source: Source, out: Path | None) -> str:
    """What a model is called while it is made: after OUT, like none of its data files, ….onnx.

    Libraries tell formats by the ends of names.
    """
    stem = "model" if out is None else out.name.removesuffix(".onnx")[:_STEM]
    taken = {Path(location).parts[0] for location in source.external}
    names = (f"{stem}{'-' * i}.onnx" for i in itertools.count())
    return next(name for name in names if name not in taken)


def place(path: Path, out: Path) -> None:
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
    if re.fullmatch(DATA_NAME, os.fsencode(target.name)) is None:
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


def left_over(path: Path, out: Path) -> list[str]:
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
            return {m.group().decode() for m in re.finditer(DATA_NAME, text)}
    except (OSError, ValueError):  # unreadable, or empty
        return set()


def read_back(path: Path, *, whole: bool) -> onnx.ModelProto:
    """A model that was written.

    Its external data are read only where they won't stay: a model past 2 GB is as large in memory.
    """
    return onnx.load(path, format="protobuf", load_external_data=whole)


def copy_source(source: Source, folder: Path, name: str) -> tuple[Path, int]:
    """The original, byte for byte, with its external data."""
    path = folder / name
    try:
        for built in folder.iterdir():  # what was tried and not taken
            built.unlink()
        if source.path is None:
            return path, path.write_bytes(source.data or b"")
        shutil.copyfile(source.path, path)
        for location in source.external:
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path.parent / location, folder / location)
    except OSError as error:
        check_unchanged(source)
        raise OutputError(write_failure(path, error)) from None
    return path, source.nbytes


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises
    ------
    OutputError
        If it can't be written.
    """
    with writing({path: text}):
        pass


@contextlib.contextmanager
def writing(texts: Mapping[Path, str]) -> Iterator[None]:
    """Text files that are written in full before what is done within, and in place after it.

    If one can't be written, nothing is done; if that fails, none of them is there.

    Raises
    ------
    OutputError
        If one can't be written.
    """
    drafts: dict[Path, Path] = {}
    with contextlib.ExitStack() as held:
        for path, text in texts.items():
            with _told(path):
                drafts[path] = held.enter_context(_own_folder(path.parent)) / "draft"
                drafts[path].write_text(text, encoding="utf-8")
        yield
        for path, draft in drafts.items():
            with _told(path):
                draft.replace(path)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
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
    temporary = _fresh(path.parent)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _fresh(folder: Path) -> Path:
    """An empty file that nobody else has, with the permissions that any new file gets."""
    path = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    path.touch(exist_ok=False)
    return path


def _usual_mode(folder: Path) -> int:
    """The permissions that any new file gets; the process's mask can't be asked for in threads."""
    fresh = _fresh(folder)
    try:
        return stat.S_IMODE(fresh.stat().st_mode)
    finally:
        fresh.unlink()
