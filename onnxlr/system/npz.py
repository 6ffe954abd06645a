"""Reads .npz files: sizes are checked before memory is spent, and nothing is unpickled."""

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
        If it is no .npz file, if it holds Python objects, if an array isn't as long as its header
        says, or if all arrays together don't fit into memory.
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
            with archive.open(member) as stream:
                _check_size(stream, member.file_size)  # type: ignore[arg-type]
            with archive.open(member) as stream:
                name = member.filename.removesuffix(".npy")
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def _check_size(stream: BinaryIO, size: int) -> None:
    """Refuse an array whose header doesn't fit the bytes that follow it; ``size`` is of both."""
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"an array is of format version {version}, not supported")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("an array holds Python objects, which are never loaded")
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
