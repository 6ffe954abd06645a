"""Reads CIFAR-10 from its Python pickles, executing nothing of them, or from JPEGs in an .npz."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.reference.files import FileError, read_arrays

CHANNELS, SIDE = 3, 32
BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"

Images = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Pixels of shape (n, 3, 32, 32), labels of shape (n,)."""


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes as a pickle of Python 3 spells them in Python 2's protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode("latin1")


# All that a pickled array calls, under numpy 1's names and numpy 2's.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): np.zeros(1).__reduce_ex__(protocol)[0]
        for core in ("core", "_core")
        for module, name, protocol in (
            ("multiarray", "_reconstruct", 2),
            ("numeric", "_frombuffer", 5),
        )
    },
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, numbers, bytes and numpy arrays; any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the global that a pickle asks for by name, if it's on the list."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def read_batch(path: Path, remedy: str) -> Images:
    """Read one file of the Python version: b"data", (n, 3072) bytes, and b"labels", n of 0..9.

    Raises FileError when the file is missing, isn't such a pickle, or asks for anything else.
    """
    try:
        # Python 2 wrote them: its strings are bytes.
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except FileNotFoundError as error:
        raise FileError(f"no file {path.name} in {path.parent}; {remedy}.") from error
    # Hostile bytes make the unpickler and numpy raise almost anything.
    except Exception as error:
        raise FileError(
            f"{path} can't be read as a CIFAR-10 batch "
            f"({type(error).__name__}: {' '.join(str(error).split())}); {remedy}."
        ) from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise FileError(f"{path} isn't a CIFAR-10 batch: no b'data' and b'labels'; {remedy}.")
    data, label = batch[b"data"], _labels(batch[b"labels"])
    width = CHANNELS * SIDE * SIDE
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2):
        raise FileError(f"{path}: b'data' isn't a matrix of bytes; {remedy}.")
    if data.shape[1] != width or label.shape != (len(data),) or not len(data):
        raise FileError(
            f"{path}: data of shape {data.shape} with labels of shape {label.shape}, expected "
            f"(n, {width}) and (n,); {remedy}."
        )
    return data.reshape(-1, CHANNELS, SIDE, SIDE), label


def read_jpegs(path: Path, remedy: str, chosen: int | None = None) -> Images:
    """Read images that are stored as JPEGs: all, or `chosen` of them at equal distances.

    The .npz holds `jpeg`, the files one after the other, `offsets`, n + 1 places where they begin
    and end, and `labels`. Raises FileError when it's anything else.
    """
    arrays = read_arrays(path, remedy, ("jpeg", "offsets", "labels"))
    jpeg, offsets, label = arrays["jpeg"], arrays["offsets"], _labels(arrays["labels"])
    count = len(label)
    sound = jpeg.dtype == np.uint8 and jpeg.ndim == 1 and offsets.dtype.kind in "iu"
    if not sound or offsets.shape != (count + 1,) or not count or offsets[-1] != len(jpeg):
        raise FileError(
            f"{path}: offsets of shape {offsets.shape} for {count} labels and {jpeg.size} bytes "
            f"of JPEG don't fit together; {remedy}."
        )
    order = np.arange(count) if chosen is None else np.linspace(0, count - 1, chosen).astype(int)
    image = np.empty((len(order), SIDE, SIDE, CHANNELS), np.uint8)
    for place, i in enumerate(order):
        try:
            content = io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())
            with Image.open(content, formats=("JPEG",)) as file:
                if file.size != (SIDE, SIDE):
                    raise ValueError(f"{file.size[0]}x{file.size[1]} pixels")
                image[place] = np.asarray(file.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise FileError(
                f"{path}: image {i} isn't a JPEG of {SIDE}x{SIDE} pixels; {remedy}."
            ) from error
    return np.ascontiguousarray(image.transpose(0, 3, 1, 2)), label[order]


def _labels(numbers: object) -> NDArray[np.int64]:
    """Return labels as int64, or an empty array if they aren't whole numbers."""
    if isinstance(numbers, list) and all(isinstance(x, int) for x in numbers):
        numbers = np.array(numbers)
    if isinstance(numbers, np.ndarray) and numbers.dtype.kind in "iu":
        return numbers.astype(np.int64)
    return np.empty(0, np.int64)
