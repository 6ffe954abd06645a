"""Reads IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped, and checks them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.reference.files import FileError

_UNSIGNED_BYTE = 8
_IMAGES, _LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"


def find_idx(folders: Iterable[Path]) -> Path | None:
    """Return the first of the folders that holds any of the four files."""
    names = [pattern.format(stem) for pattern in (_IMAGES, _LABELS) for stem in ("train", "t10k")]
    for folder in folders:
        if any(path.is_file() for name in names for path in _places(folder, name)):
            return folder
    return None


def read_idx(
    folder: Path, stem: str, side: int, remedy: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images, (n, side, side), and labels, (n,), of the split "train" or "t10k".

    Raises FileError when a file is missing, can't be unpacked, or has the wrong magic number,
    dimensions or size, and when the two files disagree on n.
    """
    path, image = _read_array(folder, _IMAGES.format(stem), 3, remedy)  # (n, height, width)
    if image.shape[1:] != (side, side):
        raise FileError(
            f"{path}: images of {image.shape[1]}x{image.shape[2]} pixels, expected {side}x{side}; "
            f"{remedy}."
        )
    path, label = _read_array(folder, _LABELS.format(stem), 1, remedy)  # (n,)
    if len(image) != len(label):
        raise FileError(f"{path}: {len(label)} labels for {len(image)} images; {remedy}.")
    return image, label


def _read_array(folder: Path, name: str, rank: int, remedy: str) -> tuple[Path, NDArray[np.uint8]]:
    """Return the path and the unsigned bytes of one file, as an array of `rank` dimensions.

    IDX: two zero bytes, a type code (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the data.
    """
    path, content = _read_bytes(folder, name, remedy)
    magic = bytes([0, 0, _UNSIGNED_BYTE, rank])
    if content[:4] != magic:
        raise FileError(
            f"{path}: magic number 0x{content[:4].hex()}, expected 0x{magic.hex()} "
            f"({rank}-dimensional unsigned bytes); {remedy}."
        )
    start = 4 + 4 * rank
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    expected = start + int(np.prod(shape, dtype=object))  # no header may make it overflow
    if len(content) != expected or not shape[0]:
        raise FileError(
            f"{path}: {len(content)} bytes, expected {expected} for dimensions {shape}; {remedy}."
        )
    return path, np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the two places of a file: plain and gzipped."""
    return folder / name, folder / f"{name}.gz"


def _read_bytes(folder: Path, name: str, remedy: str) -> tuple[Path, bytes]:
    """Return the path of the file `name` or `name`.gz, and its unpacked content."""
    plain, packed = _places(folder, name)
    path = plain if plain.is_file() else packed
    try:
        content = path.read_bytes()
        return path, content if path == plain else gzip.decompress(content)
    except FileNotFoundError as error:
        raise FileError(f"no file {name} or {name}.gz in {folder}; {remedy}.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path} can't be read ({error}); {remedy}.") from error
