"""The data sets that networks are trained on, read from whatever form of them a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.reference import cifar
from models.reference.files import FileError, read_arrays
from models.reference.idx import find_idx, read_idx


@dataclass(frozen=True)
class Data:
    """image: (n, channels, side, side) uint8, kept small until a batch is drawn; label: (n,)."""

    image: Tensor
    label: Tensor


@dataclass(frozen=True)
class DataSet:
    """The facts about a data set that a network and its training use."""

    channels: int
    side: int
    """Height and width of an image in pixels."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Of the training pixels, channel by channel, on the 0..1 scale."""
    std: tuple[float, ...]
    flipped: bool
    """Whether a mirrored image is as good to train on."""
    shift: int
    """How many pixels an image may be off its place to train on."""
    folder: Path | None
    """The folder that is read by default."""
    remedy: str
    """How to get it."""
    read: Callable[[Path, DataSet], tuple[Data, Data]]


def load(name: str, data_dir: Path | None = None) -> tuple[Data, Data]:
    """Return the training and the test images of a data set, from a folder or its default one.

    Raises FileError when the folder doesn't hold the data set or holds it damaged.
    """
    spec = DATASETS[name]
    folder = data_dir or spec.folder
    if folder is None:
        raise FileError(f"{name} has no default folder; {spec.remedy}.")
    train, test = spec.read(folder, spec)
    for data in (train, test):
        low, high = int(data.label.min()), int(data.label.max())
        if low < 0 or high >= len(spec.classes):
            raise FileError(
                f"{folder}: labels from {low} to {high}, expected 0..{len(spec.classes) - 1}; "
                f"{spec.remedy}."
            )
    return train, test


def pixels(image: Tensor) -> Tensor:
    """Return bytes as float32 in 0..1, with their shape unchanged."""
    return image.float() / 255


def to_data(image: NDArray[np.uint8], label: NDArray[Any]) -> Data:
    """Return arrays of shape (n, channels, side, side) and (n,) as tensors."""
    return Data(torch.tensor(np.ascontiguousarray(image)), torch.tensor(label).long())


def _read_idx(folder: Path, spec: DataSet) -> tuple[Data, Data]:
    (train, train_label), (test, test_label) = (
        read_idx(folder, stem, spec.side, spec.remedy) for stem in ("train", "t10k")
    )
    # (n, 28, 28) -> (n, 1, 28, 28)
    return to_data(train[:, np.newaxis], train_label), to_data(test[:, np.newaxis], test_label)


def _read_mnist(folder: Path, spec: DataSet) -> tuple[Data, Data]:
    idx_folder = find_idx((folder, folder / "MNIST" / "raw"))
    if idx_folder is not None:
        return _read_idx(idx_folder, spec)
    path = folder / "mnist-60k.npz"
    if not path.is_file():
        raise FileError(
            f"{folder} holds neither MNIST's IDX files, directly or in MNIST/raw, nor "
            f"{path.name}; {spec.remedy}."
        )
    arrays = read_arrays(path, spec.remedy, ("x", "y"))
    image, label = arrays["x"], arrays["y"]
    shape = (len(label) if label.ndim else 0, spec.side, spec.side)
    kinds = image.dtype == np.uint8 and label.dtype.kind in "iu"
    if not kinds or image.shape != shape or label.ndim != 1 or not len(label):
        raise FileError(
            f"{path}: x {image.dtype} of shape {image.shape}, y {label.dtype} of shape "
            f"{label.shape}, expected bytes (n, {spec.side}, {spec.side}) and integers (n,); "
            f"{spec.remedy}."
        )
    # The file has no test images: every sixth is held out, by a draw that is always the same.
    order = np.random.default_rng(0).permutation(len(label))
    train, test = np.split(order, [len(order) * 5 // 6])
    image = image[:, np.newaxis]  # (n, 28, 28) -> (n, 1, 28, 28)
    return to_data(image[train], label[train]), to_data(image[test], label[test])


def _read_fashion(folder: Path, spec: DataSet) -> tuple[Data, Data]:
    idx_folder = find_idx((folder, folder / "FashionMNIST" / "raw"))
    if idx_folder is None:
        raise FileError(
            f"{folder} doesn't hold Fashion-MNIST's IDX files, directly or in FashionMNIST/raw; "
            f"{spec.remedy}."
        )
    return _read_idx(idx_folder, spec)


def _read_cifar(folder: Path, spec: DataSet) -> tuple[Data, Data]:
    for place in (folder, folder / "cifar-10-batches-py"):
        if any((place / name).is_file() for name in (*cifar.BATCHES, cifar.TEST_BATCH)):
            parts = [cifar.read_batch(place / name, spec.remedy) for name in cifar.BATCHES]
            image, label = (np.concatenate(part) for part in zip(*parts, strict=True))
            test = cifar.read_batch(place / cifar.TEST_BATCH, spec.remedy)
            return to_data(image, label), to_data(*test)
    jpegs = [folder / f"cifar10-jpeg-{split}.npz" for split in ("train", "test")]
    if not any(path.is_file() for path in jpegs):
        raise FileError(
            f"{folder} holds neither CIFAR-10's batches (data_batch_1 to data_batch_5, "
            f"test_batch), directly or in cifar-10-batches-py, nor {jpegs[0].name} and "
            f"{jpegs[1].name}; {spec.remedy}."
        )
    train_data, test_data = (to_data(*cifar.read_jpegs(path, spec.remedy)) for path in jpegs)
    return train_data, test_data


DATASETS = {
    "mnist": DataSet(
        channels=1,
        side=28,
        classes=tuple("0123456789"),
        mean=(0.1307,),
        std=(0.3081,),
        flipped=False,
        shift=0,
        folder=None,
        remedy="point --data-dir at a folder with the four IDX files of "
        "http://yann.lecun.com/exdb/mnist, which torchvision.datasets.MNIST downloads too",
        read=_read_mnist,
    ),
    "fashion": DataSet(
        channels=1,
        side=28,
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        mean=(0.2860,),
        std=(0.3530,),
        flipped=True,
        shift=0,
        folder=Path("/usr/share/datasets/fashion-mnist"),
        remedy="install the Debian package dataset-fashion-mnist, or point --data-dir at a folder "
        "with the four IDX files of https://github.com/zalandoresearch/fashion-mnist",
        read=_read_fashion,
    ),
    "cifar10": DataSet(
        channels=cifar.CHANNELS,
        side=cifar.SIDE,
        classes=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        flipped=True,
        shift=4,
        folder=None,
        remedy="unpack the Python version of https://www.cs.toronto.edu/~kriz/cifar.html and "
        "point --data-dir at the folder",
        read=_read_cifar,
    ),
}
