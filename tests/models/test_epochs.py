"""What an epoch trains on and by: augmentation, learning rates, layouts, accuracy by class."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from rich.console import Console

from tests.support.data_folders import TRAIN, images

torch = pytest.importorskip("torch")

from models.reference import export, training  # noqa: E402
from models.reference.checkpoint import (  # noqa: E402
    CheckpointError,
    Recipe,
    Twist,
    load_run,
    new_run,
    save_run,
)
from models.reference.datasets import DATASETS, Data, pixels  # noqa: E402
from models.reference.networks import NETWORKS  # noqa: E402
from models.reference.place import Place, place_options  # noqa: E402
from onnxlr.training import factorize_  # noqa: E402
from tests.models.training_runs import WIDTHS, equal, run, state  # noqa: E402


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


def test_a_schedule_of_steps_falls_to_a_tenth_twice() -> None:
    steps, cosine = training.SCHEDULES["steps"], training.SCHEDULES["half-cosine"]
    wanted = [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [steps(d) for d in (0, 0.499, 0.5, 0.749, 0.75, 0.999)] == pytest.approx(wanted)
    assert [cosine(d) for d in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])
    data = Data(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    recipe = Recipe("mlp", "mnist", 4, batch_size=4, lr=0.01, seed=0, schedule="steps")
    made, rates = new_run(recipe), []
    for _ in range(2):
        training.train_epoch(
            made, data, 2, lambda *_: rates.append(made.optimizer.param_groups[0]["lr"])
        )
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_bfloat16_is_of_products_alone_and_no_weight_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label = images("fashion", TRAIN, 0)
    data = Data(torch.tensor(image[:, None]), torch.tensor(label).long())
    entropy, seen = torch.nn.functional.cross_entropy, set()

    def spied(logits: Any, label: Any) -> Any:
        seen.add(logits.dtype)
        return entropy(logits, label)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spied)
    ends = {}
    for precision in ("float32", "bfloat16"):
        recipe = Recipe(
            *("lenet", "fashion", 6, 16, 1e-3, 0),
            twist=Twist("svd", "4", 2),
            precision=precision,
        )
        made = new_run(recipe)
        training.train_epoch(made, data, 1)
        ends[precision] = {n: w.clone() for n, w in made.network.state_dict().items()}
    assert seen == {torch.float32, torch.bfloat16}
    assert not equal(ends["float32"], ends["bfloat16"])
    weights = ends["bfloat16"]
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(bool((w != w.bfloat16().float()).any()) for w in weights.values())
    # Weights that were rounded to bfloat16 would have lost their rank.
    ranks = [torch.linalg.matrix_rank(weights[f"fc{i}.weight"].double(), rtol=1e-6) for i in (1, 2)]
    assert [int(r) for r in ranks] == [4, 4]
    assert made.twist is not None
    path = tmp_path / "net.onnx"
    export.export_onnx(made.network, pixels(data.image[:3]), path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name, weight in weights.items():
        assert stored[name].dtype == np.float32
        assert np.array_equal(stored[name], weight.numpy())
    trained = {n: weights[f"{n}.weight"].double() for n in ("fc1", "fc2")}
    chained = factorize_(made.network, made.twist.plan)
    assert {p.dtype for p in chained.parameters()} == {torch.float32}
    for name, weight in trained.items():
        inner, outer = (step.weight.detach().double() for step in chained.get_submodule(name))
        assert float((outer @ inner - weight).norm() / weight.norm()) < 1e-6


def test_bfloat16_is_taken_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Place] = []
    command = click.command()(place_options(lambda place: places.append(place)))
    for able, asked in (
        ({"amx_bf16": True}, ()),
        ({"avx512_bf16": True}, ("--precision", "float32")),
        ({"avx512_bf16": True, "amx_bf16": False}, ("--precision", "auto")),
        ({"avx512_f": True, "amx_bf16": False}, ()),
        ({}, ("--precision", "bfloat16")),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert run(command, *asked).exit_code == 0
    wanted = ["bfloat16", "float32", "bfloat16", "float32", "bfloat16"]
    assert [place.precision for place in places] == wanted


def test_accuracy_by_class_is_that_of_a_slow_count() -> None:
    image, label = images("mnist", 200, 0)
    label[label == 3] = 4
    data = Data(torch.tensor(image[:, None]), torch.tensor(label).long())
    torch.manual_seed(0)
    network = NETWORKS["lenet"].build(DATASETS["mnist"], 3).eval()
    with torch.no_grad():
        classes = [int(network(pixels(one[None])).argmax()) for one in data.image]
    hits = np.array(classes) == label
    shares = training.class_accuracy(network, data)
    assert np.isnan(shares[3])
    wanted = [hits[label == c].mean() for c in range(10) if c != 3]
    assert [x for c, x in enumerate(shares) if c != 3] == pytest.approx(wanted, rel=1e-6)
    assert training.accuracy(network, data) == pytest.approx(hits.mean(), rel=1e-12)


@pytest.mark.parametrize("name", ["cnn", "vgg", "resnet20"])
def test_convolutions_resume_to_the_bit_and_export_as_trained(tmp_path: Path, name: str) -> None:
    """Layouts, momentum, running statistics, flips and shifts resume too."""
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
    for trained, path in ((whole, "whole.pt"), (again, "again.pt")):
        save_run(trained, tmp_path / path)
    assert equal(state(tmp_path / "again.pt"), state(tmp_path / "whole.pt"))
    assert not equal(state(tmp_path / "half.pt"), state(tmp_path / "whole.pt"))
    export.export_onnx(again.network, pixels(data.image[:3]), tmp_path / "net.onnx")


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


def test_an_experiment_trains_its_own_network(tmp_path: Path) -> None:
    """The network is in no recipe, and draws random numbers as it trains."""
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
