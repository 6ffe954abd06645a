"""Files that are written completely or not at all, and temporary folders that runs can't leave."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from onnxlr.errors import OutputError

# The names of files that are being written.
TEMPORARY_NAME = re.compile(r"\.onnxlr-[0-9a-f]{32}")
_WORKSPACE_PREFIX, _OWNER = ".onnxlr-run-", "owner"


def write_failure(path: Path, error: OSError) -> str:
    """The message for an operating system error on writing a file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{path}: the disk is full or the file size limit is reached; free some space"
    return f"can't write {path}: {error.strerror or error}; choose another place"


def path_exists(path: Path) -> bool:
    """Whether there is something at a path; False for names that the disk can't hold."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def workspace(out: Path | None) -> Iterator[Path]:
    """A temporary folder beside the output, so that the last step of writing it is a rename.

    Folders that killed runs have left there are removed.

    Raises
    ------
    OutputError
        If the folder can't be made.
    """
    parent = Path(tempfile.gettempdir()) if out is None else out.parent
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_locked_folder(parent))
            inner = folder / "model"
            inner.mkdir()
        except OSError as error:
            raise OutputError(write_failure(out or parent, error)) from None
        yield inner


@contextlib.contextmanager
def scratch_folder(parent: Path | None, prefix: str) -> Iterator[Path]:
    """A temporary folder that is removed afterwards, or as much of it as can be removed.

    Raises
    ------
    OSError
        If it can't be made.
    """
    folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        with contextlib.suppress(RecursionError):  # raised by Python where files can't be removed
            folder.cleanup()


@contextlib.contextmanager
def _locked_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder with a file that this process locks; folders of dead ones are removed.

    The system releases the lock when the process ends, however that happens.

    Raises
    ------
    OSError
        If it can't be made.
    """
    _remove_abandoned(parent)
    with scratch_folder(parent, _WORKSPACE_PREFIX) as folder:
        draft = folder / "claim"
        with draft.open("wb") as file:
            _lock(file)
            draft.rename(folder / _OWNER)  # it is locked before other processes look for it
            yield folder


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of runs that have ended: those whose file no process locks."""
    for folder in parent.glob(f"{_WORKSPACE_PREFIX}*"):
        with contextlib.suppress(OSError), (folder / _OWNER).open("rb+") as file:
            is_ours = os.fstat(file.fileno()).st_size == 0  # else it may be somebody's weights
            if is_ours and _lock(file):
                shutil.rmtree(folder, ignore_errors=True)


def _lock(file: BinaryIO) -> bool:
    """Lock a file; False where another process has locked it, or the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows: no folder counts as abandoned there
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all.

    Raises
    ------
    OutputError
        If it can't be written.
    """
    with staged_texts({path: text}):
        pass


@contextlib.contextmanager
def staged_texts(texts: Mapping[Path, str]) -> Iterator[None]:
    """Write text files as drafts first, and move them into place after the work within.

    If a draft can't be written, the work isn't begun; if the work fails, no file is written.

    Raises
    ------
    OutputError
        If a file can't be written.
    """
    drafts: dict[Path, Path] = {}
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            with _output_errors(path):
                drafts[path] = stack.enter_context(_locked_folder(path.parent)) / "draft"
                drafts[path].write_text(text, encoding="utf-8")
        yield
        for path, draft in drafts.items():
            with _output_errors(path):
                draft.replace(path)


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    """Turn OSError into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(write_failure(path, error)) from None


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that replaces it if the work within succeeds, else is removed.

    Raises
    ------
    OSError
        If it can't be made, or can't replace the other.
    """
    temporary = _new_file(path.parent)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _new_file(folder: Path) -> Path:
    """An empty file with a name of its own, and the permissions that any new file gets."""
    path = folder / f".onnxlr-{uuid.uuid4().hex}"
    path.touch(exist_ok=False)
    return path


def default_file_mode(folder: Path) -> int:
    """The permissions of a new file; it is created for that, as threads can't ask for the umask."""
    file = _new_file(folder)
    try:
        return stat.S_IMODE(file.stat().st_mode)
    finally:
        file.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file, or it holds no object."""
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, entry: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: readers see the previous or the new content.

    Raises
    ------
    OSError
        If it can't be written.
    """
    with replacement(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
