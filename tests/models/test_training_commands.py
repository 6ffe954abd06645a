"""Training from data to ONNX file: what is read, what is resumed, what is refused."""

import io
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from rich.console import Console

from tests.support.data_folders import (
    SHAPES,
    TRAIN,
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

from models.reference import export, resnet, train, training  # noqa: E402
from models.reference.checkpoint import (  # noqa: E402
    CheckpointError,
    Recipe,
    load_network,
    load_run,
    new_run,
    save_run,
)
from models.reference.datasets import DATASETS, Data, load, pixels  # noqa: E402
from models.reference.files import FileError, replace_file  # noqa: E402
from models.reference.networks import NETWORKS, Normalize  # noqa: E402
from models.reference.place import Place  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
WIDTHS = {"mlp": 16, "cnn": 4, "vgg": 4, "lenet": 3}


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


def run(command: Any, *arguments: object) -> Result:
    """A command's outcome; what it raises itself is told, never a traceback."""
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train_lenet(folder: Path, checkpoint: Path, *more: object, epochs: int = 3) -> Result:
    return run(
        train.main,
        *("lenet", "--data", "fashion", "--data-dir", folder, "--width", 3, "--threads", 1),
        *("--epochs", epochs, "--batch-size", 16, "--checkpoint", checkpoint, *more),
    )


def state(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def equal(a: object, b: object) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("data", list(SHAPES))
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_takes_every_data_set(name: str, data: str) -> None:
    spec = DATASETS[data]
    torch.manual_seed(0)
    network = NETWORKS[name].build(spec, WIDTHS.get(name, 4)).eval()
    image = torch.rand(3, spec.channels, spec.side, spec.side)
    with torch.no_grad():
        logits = network(image)
        alone = network(image[1:2])
    assert logits.shape == (3, 10)
    assert torch.allclose(logits[1:2], alone, rtol=0, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("mlp", "mnist"),
        ("cnn", "cifar10"),
        ("vgg", "cifar10"),
        ("lenet", "fashion"),
        ("resnet20", "cifar10"),
        ("resnet32", "mnist"),
        ("resnet56", "cifar10"),
    ],
)
def test_every_network_trains_and_exports(tmp_path: Path, name: str, data: str) -> None:
    if data == "cifar10":
        write_batches(tmp_path)
    else:
        write_idx(tmp_path)
    checkpoint, out = tmp_path / "run.pt", tmp_path / "net.onnx"
    done = run(
        train.main,
        *(name, "--data", data, "--data-dir", tmp_path, "--width", WIDTHS.get(name, 4)),
        *("--epochs", 1, "--batch-size", 16, "--checkpoint", checkpoint, "--threads", 1),
    )
    assert done.exit_code == 0, done.output
    done = run(export.main, checkpoint, out, "--data-dir", tmp_path)
    assert done.exit_code == 0, done.output
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [
        ("image", [DATASETS[data].channels, *[DATASETS[data].side] * 2])
    ]
    image = pixels(load(data, tmp_path)[1].image)
    _, network = load_network(checkpoint)
    network.eval()
    for batch in (image[:1], image[:7]):
        (found,) = session.run(["logits"], {"image": batch.numpy()})
        with torch.no_grad():
            expected = network(batch).numpy()
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_all_networks_are_tried_above() -> None:
    assert list(NETWORKS) == ["mlp", "cnn", "vgg", "lenet", "resnet20", "resnet32", "resnet56"]


def test_the_shipped_mlp_is_what_its_network_computes() -> None:
    """Normalization and layers are still those that it was trained with."""
    path = ROOT / "models" / "fashion-mlp.onnx"
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    network = NETWORKS["mlp"].build(DATASETS["fashion"], 384).eval()
    network.load_state_dict({n: torch.tensor(stored[n]) for n in network.state_dict()})
    with np.load(path.with_name("fashion-samples.npz")) as samples:
        image = samples["image"][:50]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(["logits"], {"image": image})
    with torch.no_grad():
        found = network(torch.tensor(image)).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_channels_are_normalized_one_by_one() -> None:
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    spec = DATASETS["cifar10"]
    mean, std = (np.array(x)[:, None, None] for x in (spec.mean, spec.std))
    found = Normalize(spec)(image).numpy()
    assert np.allclose(found, (image.numpy() - mean) / std, rtol=0, atol=1e-6)


def test_a_resnet_32_has_the_names_and_counts_of_the_published_weights() -> None:
    weights = NETWORKS["resnet32"].build(DATASETS["cifar10"], 16).state_dict()
    assert {"conv1.weight", "layer2.0.bn2.bias", "layer3.4.conv1.weight", "linear.bias"} <= {
        *weights
    }
    assert not {"mean", "std", "normalize.mean"} & {*weights}
    assert sum(w.numel() for n, w in weights.items() if "running" not in n and "num" not in n) == (
        464_154  # 0.46 M in the paper's table
    )


def test_a_lenet_is_that_of_the_tutorials() -> None:
    network = NETWORKS["lenet"].build(DATASETS["cifar10"], NETWORKS["lenet"].width)
    weights = list(network.parameters())
    assert [w.shape[0] for w in weights if w.ndim > 1] == [6, 16, 120, 84, 10]
    assert sum(w.numel() for w in weights) == 62_006


def test_trained_weights_keep_the_normalization_they_were_trained_with(tmp_path: Path) -> None:
    made = NETWORKS["resnet32"].build(DATASETS["cifar10"], 16)
    arrays = {n: w.numpy() for n, w in made.state_dict().items() if "num_batches" not in n}
    np.savez(tmp_path / "resnet32-cifar10-weights.npz", **arrays)
    network = resnet.load_trained(tmp_path)
    assert network.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert network.normalize.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert equal(
        {n: torch.tensor(a) for n, a in arrays.items()},
        {n: w for n, w in network.state_dict().items() if "num_batches" not in n},
    )


def test_augmented_images_are_shifted_and_mirrored_ones() -> None:
    spec, n = DATASETS["cifar10"], 400
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    made = training.augment(torch.tensor(image), spec, torch.Generator().manual_seed(0)).numpy()
    assert made.shape == image.shape
    seen = []
    for one, wanted in zip(made, image, strict=True):
        padded = np.pad(wanted, ((0, 0), (4, 4), (4, 4)))
        seen += [
            (mirrored, row, column)
            for mirrored in (False, True)
            for row in range(9)
            for column in range(9)
            if np.array_equal(
                one,
                (padded[:, :, ::-1] if mirrored else padded)[:, row : row + 32, column:][..., :32],
            )
        ]
    assert len(seen) == n  # each is one of the 162, and only one
    counts = [np.bincount([s[i] for s in seen]) for i in range(3)]
    assert [len(c) for c in counts] == [2, 9, 9]
    assert abs(counts[0][1] - n / 2) < 4 * (n / 4) ** 0.5
    assert all(c.min() > n / 9 / 2 for c in counts[1:])


def test_only_what_gains_is_augmented() -> None:
    image = torch.tensor(np.random.default_rng(0).integers(0, 256, (60, 1, 28, 28), np.uint8))
    made = {
        n: training.augment(image, DATASETS[n], torch.Generator()) for n in ("mnist", "fashion")
    }
    assert torch.equal(made["mnist"], image)
    mirrored = (made["fashion"] == image.flip(3)).all(dim=(1, 2, 3))
    kept = (made["fashion"] == image).all(dim=(1, 2, 3))
    assert bool((mirrored ^ kept).all())
    assert 15 < int(mirrored.sum()) < 45
    assert [n for n, network in NETWORKS.items() if not network.augmented] == ["mlp"]


def test_what_an_epoch_trains_on_is_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    seen: list[tuple[str, int]] = []
    for name, network in NETWORKS.items():
        recipe = Recipe(name, "fashion", WIDTHS.get(name, 4), batch_size=4, lr=0.01, seed=0)

        def augmented(image: Any, spec: Any, _: Any, name: str = name) -> Any:
            assert spec is DATASETS["fashion"]
            seen.append((name, len(image)))
            return image

        monkeypatch.setattr(training, "augment", augmented)
        training.train_epoch(new_run(recipe), data, 1)
        assert seen.count((name, 4)) == 2 * network.augmented


def test_learning_rates_optimizers_and_layouts() -> None:
    data = Data(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    for name, network in NETWORKS.items():
        recipe = Recipe(name, "mnist", WIDTHS.get(name, 4), batch_size=4, lr=0.01, seed=0)
        made = new_run(recipe)
        (group,) = made.optimizer.param_groups
        if name.startswith("resnet"):
            assert type(made.optimizer) is torch.optim.SGD
            assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (
                0.9,
                True,
                5e-4,
            )
        else:
            assert type(made.optimizer) is torch.optim.Adam
        kernels = [p for p in made.network.parameters() if p.ndim == 4]
        last = all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)
        assert (bool(kernels) and last) == network.channels_last
    rates: list[float] = []
    made = new_run(Recipe("mlp", "mnist", 4, batch_size=4, lr=0.01, seed=0))
    for _ in range(2):
        training.train_epoch(
            made, data, 2, lambda *_: rates.append(made.optimizer.param_groups[0]["lr"])
        )
    wanted = [0.005 * (1 + np.cos(np.pi * done)) for done in (0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx(wanted, rel=1e-12)


def test_accuracy_by_class_is_that_of_a_slow_count() -> None:
    image, label = images("mnist", 200, 0)
    label[label == 3] = 4
    data = Data(torch.tensor(image[:, None]), torch.tensor(label).long())
    torch.manual_seed(0)
    network = NETWORKS["lenet"].build(DATASETS["mnist"], 3).eval()
    with torch.no_grad():
        classes = [int(network(pixels(one[None])).argmax()) for one in data.image]
    hits = np.array(classes) == label
    found = training.class_accuracy(network, data)
    assert np.isnan(found[3])
    wanted = [hits[label == c].mean() for c in range(10) if c != 3]
    assert [x for c, x in enumerate(found) if c != 3] == pytest.approx(wanted, rel=1e-6)
    assert training.accuracy(network, data) == pytest.approx(hits.mean(), rel=1e-12)


KILLER = """
import os, signal, sys
from models.reference import train, training
real, calls = training.pixels, [0]
def pixels(image):
    calls[0] += 1
    if calls[0] == 6:  # three steps and a look at the test images are an epoch: the second step
        os.kill(os.getpid(), signal.SIGKILL)
    return real(image)
training.pixels = pixels
train.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_file(tmp_path: Path) -> None:
    write_idx(tmp_path)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    assert train_lenet(tmp_path, whole).exit_code == 0
    command = ["lenet", "--data", "fashion", "--data-dir", str(tmp_path), "--width", "3"]
    command += ["--epochs", "3", "--batch-size", "16", "--checkpoint", str(cut), "--threads", "1"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state(cut)["epoch"] == 1
    done = train_lenet(tmp_path, cut)
    assert done.exit_code == 0
    assert "cut.pt: 1 epochs done" in done.output
    assert "epoch 2/3" in done.output
    assert "epoch 1/3" not in done.output
    assert equal(state(cut), state(whole))
    # What the user sees of the exporter is the command's own line.
    made = [tmp_path / "cut.onnx", tmp_path / "whole.onnx"]
    assert run(export.main, whole, made[1]).exit_code == 0
    done_export = subprocess.run(
        [sys.executable, "-m", "models.reference.export", cut, made[0]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done_export.stderr == ""
    assert len(done_export.stdout.splitlines()) == 1
    assert made[0].read_bytes() == made[1].read_bytes()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, what: Callable[[Any], Any]) -> None:
    """Have `what` happen to the images of one step or look."""
    calls = iter(range(1, 1000))

    def spoiled(image: Any) -> Any:
        return what(pixels(image)) if next(calls) == call else pixels(image)

    monkeypatch.setattr(training, "pixels", spoiled)


@pytest.fixture
def heeded() -> Iterator[None]:
    """SIGINT as a terminal's: tests that a shell started in the background have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_ends_with_130_and_goes_on_to_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    assert train_lenet(tmp_path, whole).exit_code == 0

    def interrupted(image: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return image

    with monkeypatch.context() as patched:
        interrupt_at(patched, 7, interrupted)
        stopped = train_lenet(tmp_path, cut)
    assert stopped.exit_code == 130
    assert f"stopped; the same command goes on from {cut}" in stopped.output
    assert state(cut)["epoch"] == 1
    assert train_lenet(tmp_path, cut).exit_code == 0
    assert equal(state(cut), state(whole))


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_while_data_is_read_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    stopped = train_lenet(tmp_path, tmp_path / "run.pt")
    assert stopped.exit_code == 130
    assert not (tmp_path / "run.pt").exists()


@pytest.mark.parametrize("name", ["cnn", "vgg", "resnet20"])
def test_convolutions_resume_to_the_bit_and_export_as_trained(tmp_path: Path, name: str) -> None:
    """Layouts, momentum, running statistics, flips and shifts too."""
    image, label = images("cifar10", TRAIN, 0)
    data = Data(torch.tensor(image), torch.tensor(label).long())
    recipe = Recipe(name, "cifar10", width=4, batch_size=16, lr=1e-2, seed=0)
    whole, half = new_run(recipe), new_run(recipe)
    training.train_epoch(whole, data, 2)
    training.train_epoch(whole, data, 2)
    training.train_epoch(half, data, 2)
    save_run(half, tmp_path / "half.pt")
    again = load_run(recipe, tmp_path / "half.pt")
    training.train_epoch(again, data, 2)
    for run, path in ((whole, "whole.pt"), (again, "again.pt")):
        save_run(run, tmp_path / path)
    assert equal(state(tmp_path / "again.pt"), state(tmp_path / "whole.pt"))
    assert not equal(state(tmp_path / "half.pt"), state(tmp_path / "whole.pt"))
    export.export_onnx(again.network, pixels(data.image[:3]), tmp_path / "net.onnx")


def test_more_epochs_go_on_from_a_finished_run(tmp_path: Path) -> None:
    write_idx(tmp_path)
    path = tmp_path / "run.pt"
    assert train_lenet(tmp_path, path, epochs=1).exit_code == 0
    done = train_lenet(tmp_path, path, epochs=2)
    assert "epoch 2/2" in done.output
    assert state(path)["epoch"] == 2


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    path, before = tmp_path / "run.pt", tmp_path / "before.pt"
    assert train_lenet(tmp_path, before, epochs=1).exit_code == 0
    path.write_bytes(before.read_bytes())
    interrupt_at(monkeypatch, 2, lambda image: image * np.inf)
    done = train_lenet(tmp_path, path)
    assert done.exit_code == 1
    assert path.read_bytes() == before.read_bytes()
    (line,) = [x for x in done.output.splitlines() if x.startswith("Error")]
    assert line == done.output.splitlines()[-1]
    assert "epoch 2, step 2: the loss is nan at a learning rate of 0.000" in line
    assert "(--lr 0.001); start again with a lower --lr, such as 0.0001" in line
    assert "the one of 1 epochs is kept" in line


def test_weights_that_the_last_step_lost_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    monkeypatch.setattr(training, "pixels", lambda image: image.float() + 1e3)
    # One step an epoch: its loss is still that of the weights before.
    recipe = Recipe("resnet20", "mnist", width=2, batch_size=8, lr=1e38, seed=0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    path = tmp_path / "run.pt"
    with pytest.raises(training.DivergedError, match=r"1, step 1: 1.weight is no longer finite at"):
        training.train_model(recipe, data, data, 1, path, Console(file=io.StringIO()), network)
    assert state(path)["epoch"] == 0
    assert bool(torch.isfinite(state(path)["network"]["1.weight"]).all())


@pytest.mark.parametrize("rate", ["0", "-1", "1e39", "inf", "fast"])
def test_a_learning_rate_that_makes_no_sense_is_one_clear_line(tmp_path: Path, rate: str) -> None:
    done = train_lenet(tmp_path, tmp_path / "run.pt", "--lr", rate)
    assert done.exit_code == 2
    assert "'--lr'" in done.output.splitlines()[-1]


def test_another_recipe_is_refused_with_what_changed(tmp_path: Path) -> None:
    write_idx(tmp_path)
    path = tmp_path / "run.pt"
    assert train_lenet(tmp_path, path, epochs=1).exit_code == 0
    done = train_lenet(tmp_path, path, "--seed", 1, "--lr", 0.5, "--twist", "svd")
    assert done.exit_code == 1
    assert "made with lr 0.001 (now 0.5), seed 0 (now 1), twist none (now svd 0.25 200); use" in (
        done.output
    )


@pytest.mark.parametrize("keep", [0, 20, 0.5, -1])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path, keep: float) -> None:
    write_idx(tmp_path)
    path = tmp_path / "run.pt"
    assert train_lenet(tmp_path, path, epochs=1).exit_code == 0
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    for done in (train_lenet(tmp_path, path), run(export.main, path, tmp_path / "out.onnx")):
        assert done.exit_code == 1
        (line,) = done.output.splitlines()
        assert f"{path} can't be read as a checkpoint" in line
        assert "delete it" in line


@pytest.mark.parametrize(
    "content", [[1, 2], {"recipe": {}}, {"recipe": {"twist": None, "seed": 0}}, torch.zeros(3)]
)
def test_a_foreign_checkpoint_is_one_clear_line(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    done = run(export.main, path, tmp_path / "out.onnx")
    assert done.exit_code == 1
    assert "can't be read as a checkpoint" in done.output


def test_a_checkpoint_that_cannot_be_written_shows_before_an_epoch(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "file").write_text("")
    done = train_lenet(tmp_path, tmp_path / "file" / "run.pt")
    assert done.exit_code == 1
    assert len(done.output.splitlines()) == 1
    assert "run.pt can't be written (" in done.output


def test_a_file_is_never_half_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    whole = Path.write_bytes

    def interrupted(self: Path, content: bytes) -> None:
        whole(self, content[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new one")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_replacing_a_file_fails_whole(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileError, match="taken can't be written"):
        replace_file(tmp_path / "taken", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_a_run_begins_with_the_weights_it_is_given(tmp_path: Path) -> None:
    write_idx(tmp_path)
    first, arrays = tmp_path / "first.pt", tmp_path / "weights.npz"
    assert train_lenet(tmp_path, first, epochs=1).exit_code == 0
    weights = state(first)["network"]
    np.savez(arrays, **{name: weight.numpy() for name, weight in weights.items()})
    ends = []
    for number, init in enumerate((first, arrays)):
        path = tmp_path / f"second{number}.pt"
        # So small a rate that the weights stay where they began, but for rounding.
        done = train_lenet(tmp_path, path, "--init", init, "--lr", 1e-12, epochs=1)
        assert done.exit_code == 0, done.output
        ends.append(state(path)["network"])
        assert all(torch.allclose(ends[-1][n], w, rtol=0, atol=1e-8) for n, w in weights.items())
    assert equal(*ends)
    other = train_lenet(tmp_path, tmp_path / "second0.pt", "--lr", 1e-12, epochs=1)
    assert other.exit_code == 1
    assert "(now none)" in other.output


def test_weights_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    write_idx(tmp_path)
    network = NETWORKS["lenet"].build(DATASETS["fashion"], 3)
    arrays = {name: weight.numpy() for name, weight in network.state_dict().items()}
    arrays["conv1.weight"] = arrays["conv1.weight"][:, :, 1:]
    arrays["conv9.weight"] = arrays.pop("conv2.weight")
    np.savez(tmp_path / "w.npz", **arrays)
    done = train_lenet(tmp_path, tmp_path / "run.pt", "--init", tmp_path / "w.npz")
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    for words in (
        "conv2.weight is missing",
        "conv9.weight is of another network",
        "conv1.weight has shape (3, 1, 4, 5), not (3, 1, 5, 5)",
    ):
        assert words in line
    assert not (tmp_path / "run.pt").exists()


def test_a_twisted_run_ends_at_its_rank_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    settings = ("--twist", "svd", "--rank", "4", "--every", 2)
    assert train_lenet(tmp_path, whole, *settings).exit_code == 0
    weights = state(whole)["network"]
    # Three epochs of three steps: the last distortion is that of the end, not of a step.
    assert [int(torch.linalg.matrix_rank(weights[f"fc{i}.weight"], rtol=1e-5)) for i in (1, 2)] == [
        4,
        4,
    ]
    assert state(whole)["twist"]["steps"] == 9
    with monkeypatch.context() as patched:
        interrupt_at(patched, 7, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train_lenet(tmp_path, cut, *settings).exit_code == 130
    assert state(cut)["twist"]["steps"] == 3
    assert train_lenet(tmp_path, cut, *settings).exit_code == 0
    assert equal(state(cut), state(whole))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--twist", "nonsense"), "nonsense"),
        (("--twist", "svd", "--rank", "many"), "many"),
        (("--rank", "3"), "name a method with --twist"),
        (("--every", 3), "name a method with --twist"),
    ],
)
def test_a_twist_that_makes_no_sense_is_one_clear_line(
    tmp_path: Path, settings: tuple[object, ...], words: str
) -> None:
    write_idx(tmp_path)
    done = train_lenet(tmp_path, tmp_path / "run.pt", *settings)
    assert done.exit_code == 2
    assert words in done.output.splitlines()[-1]
    assert not (tmp_path / "run.pt").exists()


def test_an_experiment_trains_its_own_network(tmp_path: Path) -> None:
    """One that no recipe knows, which draws numbers of its own as it trains."""
    recipe = Recipe("lenet", "fashion", width=3, batch_size=16, lr=1e-3, seed=0)
    image, label = images("fashion", TRAIN, 0)
    data = Data(torch.tensor(image[:, None]), torch.tensor(label).long())

    def network() -> Any:
        torch.manual_seed(1)
        head = torch.nn.Linear(784, 10)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), head)

    def trained(path: Path) -> Any:
        console = Console(file=io.StringIO())
        return training.train_model(
            recipe, data, data, 2, path, console, network(), place=Place(threads=1)
        )

    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    trained(whole)
    half = new_run(recipe, network())
    training.train_epoch(half, data, 2)
    save_run(half, cut)
    run_again = trained(cut)
    assert isinstance(run_again.network, torch.nn.Sequential)
    assert equal(state(cut), state(whole))
    done = run(export.main, cut, tmp_path / "out.onnx")
    assert done.exit_code == 1
    assert (
        "conv1.bias is missing, conv1.weight is missing, conv2.bias is missing and" in done.output
    )
    with pytest.raises(CheckpointError, match=r"made with seed 0 \(now 1\)"):
        load_run(replace(recipe, seed=1), cut, network())


def test_a_device_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    write_idx(tmp_path)
    done = train_lenet(tmp_path, tmp_path / "a.pt", "--device", "cuda")
    assert done.exit_code == 2
    assert "Error: --device cuda: PyTorch sees no CUDA device" in done.output
    assert not (tmp_path / "a.pt").exists()
