"""The reference networks: shapes, normalization, counts; that they train and export."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.support.data_folders import SHAPES, write_batches, write_idx

torch = pytest.importorskip("torch")

from models.reference import export, resnet, train  # noqa: E402
from models.reference.checkpoint import (  # noqa: E402
    load_network,
)
from models.reference.datasets import DATASETS, load, pixels  # noqa: E402
from models.reference.networks import NETWORKS, Normalize  # noqa: E402
from tests.models.training_runs import WIDTHS, equal, run  # noqa: E402

ROOT = Path(__file__).parent.parent.parent


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
        (logits,) = session.run(["logits"], {"image": batch.numpy()})
        with torch.no_grad():
            expected = network(batch).numpy()
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


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
        logits = network(torch.tensor(image)).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_channels_are_normalized_one_by_one() -> None:
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    spec = DATASETS["cifar10"]
    mean, std = (np.array(x)[:, None, None] for x in (spec.mean, spec.std))
    pixels_out = Normalize(spec)(image).numpy()
    assert np.allclose(pixels_out, (image.numpy() - mean) / std, rtol=0, atol=1e-6)


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
