"""Small data sets in the very formats in which people have them."""

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
Images = tuple[Bytes, NDArray[np.uint8]]
SHAPES = {"mnist": (28, 28), "fashion": (28, 28), "cifar10": (3, 32, 32)}
TRAIN, TEST = 40, 20


def images(name: str, n: int, seed: int) -> Images:
    """Noise about a level that the label gives: enough to learn something from."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 10, n, dtype=np.uint8)
    image = rng.integers(0, 60, (n, *SHAPES[name]), dtype=np.uint8)
    return image + 20 * label.reshape(-1, *[1] * (image.ndim - 1)), label


def idx(array: Bytes) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(folder: Path, packed: bool = False) -> tuple[Images, Images]:
    folder.mkdir(parents=True, exist_ok=True)
    splits = images("mnist", TRAIN, 0), images("mnist", TEST, 1)
    for stem, (image, label) in zip(("train", "t10k"), splits, strict=True):
        for name, array in (("images-idx3", image), ("labels-idx1", label)):
            path, content = folder / f"{stem}-{name}-ubyte", idx(array)
            if packed:
                path, content = path.with_name(path.name + ".gz"), gzip.compress(content)
            path.write_bytes(content)
    return splits


def python2_batch(image: Bytes, label: NDArray[np.uint8]) -> bytes:
    """A batch to the byte as Python 2 pickled it, which is what CIFAR-10's authors did."""
    matrix = image.reshape(len(image), -1)
    rows, columns = (size.to_bytes(4, "little") for size in matrix.shape)
    data = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01J" + rows + b"J" + columns + b"\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + matrix.size.to_bytes(4, "little") + matrix.tobytes() + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([x]) for x in label) + b"e"
    return b"\x80\x02}(U\x04data" + data + b"U\x06labels" + labels + b"U\x05batchU\x01xu."


def modern_batch(protocol: int) -> Callable[[Bytes, NDArray[np.uint8]], bytes]:
    def write(image: Bytes, label: NDArray[np.uint8]) -> bytes:
        batch = {b"data": image.reshape(len(image), -1), b"labels": label.tolist()}
        return pickle.dumps(batch, protocol)

    return write


def write_batches(
    folder: Path, write: Callable[[Bytes, NDArray[np.uint8]], bytes] = python2_batch
) -> tuple[Images, Images]:
    folder.mkdir(parents=True, exist_ok=True)
    (image, label), test = images("cifar10", TRAIN, 0), images("cifar10", TEST, 1)
    for i in range(5):
        part = slice(8 * i, 8 * i + 8)
        (folder / f"data_batch_{i + 1}").write_bytes(write(image[part], label[part]))
    (folder / "test_batch").write_bytes(write(*test))
    return (image, label), test


def jpegs(image: Bytes, label: NDArray[np.uint8]) -> dict[str, Any]:
    files = []
    for one in image:
        file = io.BytesIO()
        Image.fromarray(one.transpose(1, 2, 0)).save(file, "JPEG", quality=95, subsampling=0)
        files.append(file.getvalue())
    return {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": label,
    }
