"""Data sets as they are read: pixels as stored, and damaged files in one clear line."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from tests.support.data_folders import (
    Bytes,
    Images,
    idx,
    images,
    jpegs,
    modern_batch,
    python2_batch,
    write_batches,
    write_idx,
)

torch = pytest.importorskip("torch")

from models.reference.datasets import DATASETS, Data, load  # noqa: E402
from models.reference.files import FileError  # noqa: E402
from models.reference.samples import main as write_samples  # noqa: E402


def same(data: Data, wanted: Images) -> None:
    image, label = wanted
    assert data.image.dtype == torch.uint8
    assert data.label.dtype == torch.int64
    assert np.array_equal(data.image.numpy(), image.reshape(len(image), -1, *image.shape[-2:]))
    assert np.array_equal(data.label.numpy(), label)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "inside"),
    [("mnist", ""), ("mnist", "MNIST/raw"), ("fashion", ""), ("fashion", "FashionMNIST/raw")],
)
def test_idx_files_give_back_their_pixels(
    tmp_path: Path, name: str, inside: str, packed: bool
) -> None:
    wanted = write_idx(tmp_path / inside, packed)
    for data, split in zip(load(name, tmp_path), wanted, strict=True):
        same(data, split)


def test_samples_and_the_rest_are_all_test_images(tmp_path: Path) -> None:
    _, (image, label) = write_idx(tmp_path, packed=False)
    count, parts = len(label) // 3, []
    for name, flags in (("some", []), ("rest", ["--rest"])):
        path = tmp_path / f"{name}.npz"
        arguments = [f"--data-dir={tmp_path}", f"--count={count}", f"--out={path}", *flags]
        CliRunner().invoke(write_samples, arguments, catch_exceptions=False)
        with np.load(path) as arrays:
            assert arrays["image"].dtype == np.float32
            assert arrays["label"].dtype == np.int64
            pixels = np.rint(255 * arrays["image"]).astype(np.uint8).reshape(-1, *image.shape[1:])
            parts.append({(x.tobytes(), y) for x, y in zip(pixels, arrays["label"], strict=True)})
    assert [len(part) for part in parts] == [count, len(label) - count]
    assert parts[0] | parts[1] == {(x.tobytes(), y) for x, y in zip(image, label, strict=True)}


def test_mnist_in_one_file_is_split_by_the_seeded_draw(tmp_path: Path) -> None:
    image, label = images("mnist", 60, 0)
    np.savez(tmp_path / "mnist-60k.npz", x=image, y=label)
    order = np.random.default_rng(0).permutation(60)
    train_data, test_data = load("mnist", tmp_path)
    same(train_data, (image[order[:50]], label[order[:50]]))
    same(test_data, (image[order[50:]], label[order[50:]]))


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize(
    "write", [python2_batch, modern_batch(2), modern_batch(5)], ids=["python2", "2", "5"]
)
def test_cifar_pickles_give_back_their_pixels(
    tmp_path: Path, inside: str, write: Callable[[Bytes, NDArray[np.uint8]], bytes]
) -> None:
    wanted = write_batches(tmp_path / inside, write)
    for data, split in zip(load("cifar10", tmp_path), wanted, strict=True):
        same(data, split)


def test_jpegs_give_back_their_pixels_within_the_loss(tmp_path: Path) -> None:
    ramp = np.arange(32, dtype=np.uint8)
    # Smooth, so that JPEG keeps it, and different along every axis.
    image = (
        np.stack(
            [
                4 * ramp[:, None] + 2 * ramp,
                200 - 3 * ramp + 0 * ramp[:, None],
                0 * ramp + 5 * ramp[:, None],
            ]
        )[None]
        + np.arange(20, dtype=np.uint8)[:, None, None, None]
    )
    label = np.arange(20, dtype=np.uint8) % 10
    for split in ("train", "test"):
        np.savez(tmp_path / f"cifar10-jpeg-{split}.npz", **jpegs(image, label))
    for data in load("cifar10", tmp_path):
        assert np.array_equal(data.label.numpy(), label)
        assert data.image.shape == image.shape
        assert np.abs(data.image.numpy().astype(int) - image).max() <= 6


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    write_batches(tmp_path)
    marker = tmp_path / "executed"
    content = pickle.dumps({b"data": _Hostile(marker), b"labels": [1]}, 2)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(FileError, match=r"data_batch_3 .* asks for \w+\.mkdir\)") as caught:
        load("cifar10", tmp_path)
    assert "\n" not in caught.value.message
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()  # so the file would have done it


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _labels_of(label: Bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.write_bytes(idx(label))

    return write


def _foreign(path: Path) -> None:
    path.write_bytes(b"\x89PNG what is this")


BAD_IDX: list[tuple[str, Callable[[Path], object], str]] = [
    ("train-images-idx3-ubyte", _cut, "31371 bytes, expected 31376"),
    ("train-images-idx3-ubyte", _grown, "31380 bytes, expected 31376"),
    ("t10k-images-idx3-ubyte", lambda p: p.write_bytes(b"\0\0\x08\3\0\0"), "6 bytes, expected 16"),
    ("t10k-images-idx3-ubyte", lambda p: p.write_bytes(b""), "magic number 0x, expected"),
    ("t10k-images-idx3-ubyte", _foreign, "magic number 0x89504e47, expected 0x00000803"),
    ("t10k-images-idx3-ubyte", _labels_of(np.zeros(20, np.uint8)), "magic number 0x00000801"),
    ("t10k-images-idx3-ubyte", _labels_of(np.zeros((20, 5, 5), np.uint8)), "images of 5x5 pixels"),
    ("t10k-labels-idx1-ubyte", _labels_of(np.zeros(19, np.uint8)), "19 labels for 20 images"),
    ("t10k-labels-idx1-ubyte", _labels_of(np.full(20, 10, np.uint8)), "labels from 10 to 10"),
    ("t10k-labels-idx1-ubyte", Path.unlink, "no file t10k-labels-idx1-ubyte or t10k-labels"),
    (
        "t10k-labels-idx1-ubyte",
        lambda p: p.rename(f"{p}.gz"),
        "t10k-labels-idx1-ubyte.gz can't be read",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD_IDX)
def test_a_bad_idx_file_is_one_clear_line(
    tmp_path: Path, name: str, spoil: Callable[[Path], object], message: str
) -> None:
    write_idx(tmp_path)
    spoil(tmp_path / name)
    with pytest.raises(FileError) as caught:
        load("fashion", tmp_path)
    told = caught.value.message
    assert message in told
    assert str(tmp_path) in told
    assert told.endswith(DATASETS["fashion"].remedy + ".")
    assert "\n" not in told


def _pickled(content: object) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps(content, 2))


ROWS = np.zeros((2, 3072), np.uint8)


BAD_BATCHES: list[tuple[str, Callable[[Path], object], str]] = [
    ("data_batch_2", _cut, "data_batch_2 can't be read as a CIFAR-10 batch"),
    ("test_batch", _foreign, "test_batch can't be read as a CIFAR-10 batch"),
    ("test_batch", lambda p: p.write_bytes(b""), "test_batch can't be read as a CIFAR-10 batch"),
    ("test_batch", Path.unlink, "no file test_batch in"),
    ("data_batch_1", _pickled([1, 2]), "data_batch_1 isn't a CIFAR-10 batch"),
    ("data_batch_1", _pickled({b"data": ROWS}), "data_batch_1 isn't a CIFAR-10 batch"),
    ("data_batch_1", _pickled({b"data": [[1]], b"labels": [1]}), "isn't a matrix of bytes"),
    ("data_batch_1", _pickled({b"data": ROWS[:, 1:], b"labels": [1, 2]}), "shape (2, 3071)"),
    ("data_batch_1", _pickled({b"data": ROWS, b"labels": [1]}), "labels of shape (1,)"),
    ("data_batch_1", _pickled({b"data": ROWS, b"labels": ["a", "b"]}), "labels of shape (0,)"),
    ("data_batch_1", _pickled({b"data": ROWS, b"labels": [1, [2]]}), "labels of shape (0,)"),
    ("data_batch_1", _pickled({b"data": ROWS, b"labels": [1, -2]}), "labels from -2 to 9"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD_BATCHES)
def test_a_bad_batch_is_one_clear_line(
    tmp_path: Path, name: str, spoil: Callable[[Path], object], message: str
) -> None:
    write_batches(tmp_path)
    spoil(tmp_path / name)
    with pytest.raises(FileError) as caught:
        load("cifar10", tmp_path)
    told = caught.value.message
    assert message in told
    assert str(tmp_path) in told
    assert told.endswith(DATASETS["cifar10"].remedy + ".")
    assert "\n" not in told


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays.pop(name)


BAD_JPEGS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (_without("offsets"), "lacks the arrays offsets"),
    (lambda a: a.update(offsets=a["offsets"][:-1]), "offsets of shape (2,) for 2 labels"),
    (lambda a: a.update(offsets=a["offsets"] * 1.0), "don't fit together"),
    (lambda a: a.update(jpeg=a["jpeg"][:-1]), "don't fit together"),
    (lambda a: a.update(jpeg=np.zeros_like(a["jpeg"])), "image 0 isn't a JPEG of 32x32"),
    (lambda a: a.update(offsets=a["offsets"] + [0, -300, 0]), "image 0 isn't a JPEG of 32x32"),
    (
        lambda a: a.update(jpegs(np.zeros((2, 3, 32, 33), np.uint8), np.zeros(2, np.uint8))),
        "image 0 isn't a JPEG of 32x32",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_JPEGS)
def test_bad_jpegs_are_one_clear_line(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    arrays = jpegs(*images("cifar10", 2, 0))
    np.savez(tmp_path / "cifar10-jpeg-train.npz", **arrays)
    spoil(arrays)
    np.savez(tmp_path / "cifar10-jpeg-test.npz", **arrays)
    with pytest.raises(FileError) as caught:
        load("cifar10", tmp_path)
    told = caught.value.message
    assert message in told
    assert "cifar10-jpeg-test.npz" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4 half a zip", b"\x93NUMPY\1\0", pickle.dumps({"x": 1})]
)
def test_a_file_that_is_no_npz_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mnist-60k.npz").write_bytes(content)
    with pytest.raises(FileError, match=r"mnist-60k.npz can't be read as .npz \(\w+\); point"):
        load("mnist", tmp_path)


def test_a_lone_array_and_other_arrays_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "mnist-60k.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(FileError, match="can't be read as"):
        load("mnist", tmp_path)
    np.savez(path, x=np.zeros((3, 28, 28)), y=np.zeros(3, int))
    with pytest.raises(FileError, match=r"x float64 of shape \(3, 28, 28\), y int64"):
        load("mnist", tmp_path)
    np.savez(path, x=np.zeros((3, 28, 28), np.uint8), y=np.zeros(4, int))
    with pytest.raises(FileError, match=r"y int64 of shape \(4,\), expected bytes"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnist", ["MNIST/raw", "mnist-60k.npz"]),
        ("fashion", ["FashionMNIST/raw", "dataset-fashion-mnist"]),
        ("cifar10", ["data_batch_1", "cifar-10-batches-py", "cifar10-jpeg-train.npz", "kriz"]),
    ],
)
def test_an_empty_folder_is_told_what_was_looked_for(
    tmp_path: Path, name: str, words: list[str]
) -> None:
    with pytest.raises(FileError) as caught:
        load(name, tmp_path)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_without_a_folder_the_remedy_is_told() -> None:
    with pytest.raises(FileError, match="cifar10 has no default folder; unpack"):
        load("cifar10")
