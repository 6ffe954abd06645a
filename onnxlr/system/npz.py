"""Reads .npz files: sizes are checked before memory is spent, and of Python objects only text."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from onnxlr.system.memory import available_memory

_ALWAYS_READ = 1 << 30  # bytes of arrays that are read however little memory is free


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file by name.

    Raises
    ------
    OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error
        If it is no .npz file, if it holds Python objects other than text, if an array isn't as long
        as its header says, or if all arrays together don't fit into memory.
    """
    arrays = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        free = available_memory()
        if size > max(_ALWAYS_READ, free):
            raise ValueError(f"its arrays take {size:,} bytes, {free:,} bytes of memory are free")
        for member in members:
            if not member.filename.endswith(".npy"):
                continue
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as stream:
                if _check_header(stream, member.file_size):  # type: ignore[arg-type]
                    arrays[name] = _read_text(stream)  # type: ignore[arg-type]
                    continue
            with archive.open(member) as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def read_text_array(path: Path) -> NDArray[Any] | None:
    """The array of a .npy file that holds text as Python objects; None if it holds anything else.

    Raises
    ------
    OSError, ValueError, pickle.UnpicklingError
        If it is no .npy file, or holds Python objects other than text.
    """
    with path.open("rb") as file:
        return _read_text(file) if _check_header(file, path.stat().st_size) else None


class _TextUnpickler(pickle.Unpickler):
    """Makes arrays and nothing else: a file of samples must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what NumPy makes arrays with."""
        made_by = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
        if module in made_by and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module, name)
        raise ValueError("an array holds Python objects, of which only text is loaded")


def _read_text(stream: BinaryIO) -> NDArray[Any]:
    """An array of text that NumPy stored as objects; its header is read."""
    array = np.asarray(_TextUnpickler(stream).load())
    if not all(isinstance(item, str | bytes) for item in array.reshape(-1)):
        raise ValueError("an array holds Python objects, of which only text is loaded")
    return array


def _check_header(stream: BinaryIO, size: int) -> bool:
    """Refuse an array whose header doesn't fit the bytes that follow it; ``size`` is of both.

    Returns whether Python objects follow.
    """
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"an array is of format version {version}, not supported")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject:
        return True
    if any(d < 0 for d in shape):
        raise ValueError(f"an array has shape {list(shape)}")
    needed = dtype.itemsize
    for d in shape:
        needed *= d
    if needed != size - stream.tell():
        raise ValueError(
            f"an array of {dtype}{list(shape)} needs {needed:,} bytes and has "
            f"{size - stream.tell():,}"
        )
    return False
