"""Reads Fashion-MNIST from its IDX files, plain or gzipped, and checks what it reads."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

DEFAULT_DATA_DIR = Path("/usr/share/datasets/fashion-mnist")

_REMEDY = (
    "install the Debian package dataset-fashion-mnist, or point --data-dir at a folder with the "
    "four IDX files of https://github.com/zalandoresearch/fashion-mnist"
)
# Files and number of images of each split, as the dataset's README gives them.
_SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
_SIDE = 28
_CLASSES = 10


class DataError(click.ClickException):
    """A Fashion-MNIST file is missing or isn't what it should be; the message says which."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one split, in the files' order.

    image : ndarray of shape (n, 28, 28), uint8, 0..255
    label : ndarray of shape (n,), uint8, 0..9
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


def load_split(data_dir: Path, split: str) -> Split:
    """Read the "train" (60,000) or "test" (10,000) images from the IDX files in `data_dir`.

    Raises DataError when a file is missing, can't be unpacked, or has the wrong magic number,
    dimensions, size or labels.
    """
    stem, count = _SPLITS[split]
    image = _read_idx(data_dir, f"{stem}-images-idx3-ubyte", (count, _SIDE, _SIDE))
    label = _read_idx(data_dir, f"{stem}-labels-idx1-ubyte", (count,))
    if label.max() >= _CLASSES:
        raise DataError(
            f"{data_dir}: the {split} labels reach {label.max()}, expected 0..{_CLASSES - 1}; "
            f"{_REMEDY}."
        )
    return Split(image, label)


def _read_idx(data_dir: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The unsigned bytes of one IDX file, as an array of the shape that its header must give.

    IDX: two zero bytes, a type code (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the data.
    """
    path, content = _read_bytes(data_dir, name)
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, dtype=">u4").tobytes()
    if content[:4] != header[:4]:
        raise DataError(
            f"{path}: magic number 0x{content[:4].hex()}, expected 0x{header[:4].hex()} "
            f"({len(shape)}-dimensional unsigned bytes); {_REMEDY}."
        )
    if content[: len(header)] != header:
        found = np.frombuffer(content[4 : len(header)].ljust(len(header) - 4, b"\0"), dtype=">u4")
        raise DataError(f"{path}: dimensions {found.tolist()}, expected {list(shape)}; {_REMEDY}.")
    expected = len(header) + int(np.prod(shape))
    if len(content) != expected:
        raise DataError(f"{path}: {len(content)} bytes, expected {expected}; {_REMEDY}.")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def _read_bytes(data_dir: Path, name: str) -> tuple[Path, bytes]:
    """The path found for `name`, plain or .gz, and its unpacked content."""
    plain, packed = data_dir / name, data_dir / f"{name}.gz"
    try:
        if plain.is_file():
            return plain, plain.read_bytes()
        if packed.is_file():
            return packed, gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{data_dir / name}[.gz] can't be read ({error}); {_REMEDY}.") from error
    raise DataError(f"Fashion-MNIST: no file {name} or {name}.gz in {data_dir}; {_REMEDY}.")
