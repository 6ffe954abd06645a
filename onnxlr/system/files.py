"""Files that are written whole or not at all, and folders that vanish with their run."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from onnxlr.errors import OutputError

TEMPORARY_PREFIX = ".onnxlr-"  # what files are called that are being written
_WORKSPACE, _OWNER = ".onnxlr-run-", "owner"


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
def scratch_folder(parent: Path | None, prefix: str) -> Iterator[Path]:
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
    with scratch_folder(parent, _WORKSPACE) as folder:
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


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises
    ------
    OutputError
        If it can't be written.
    """
    with staged_texts({path: text}):
        pass


@contextlib.contextmanager
def staged_texts(texts: Mapping[Path, str]) -> Iterator[None]:
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
def replacement(path: Path) -> Iterator[Path]:
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
    path = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    path.touch(exist_ok=False)
    return path


def default_file_mode(folder: Path) -> int:
    """The permissions that any new file gets; the process's mask can't be asked for in threads."""
    fresh = _fresh(folder)
    try:
        return stat.S_IMODE(fresh.stat().st_mode)
    finally:
        fresh.unlink()
