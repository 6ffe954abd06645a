"""DeepTwist in the metric of the layers' inputs, and the hand-over of its end to factors."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import onnxlr
from onnxlr.errors import UsageError

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from onnxlr.training import DeepTwist, factorize_  # noqa: E402
from onnxlr.training.inputs import InputMoments  # noqa: E402
from tests.support.training import Net, export, run, task, train  # noqa: E402

Matrix = NDArray[np.float64]


class Twins(nn.Module):
    """Layers of one shape each that are given different things."""

    def __init__(self, stride: int = 1, padding_mode: str = "zeros") -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": 1, "padding_mode": padding_mode}
        self.first = nn.Conv2d(4, 4, 3, stride=stride, **options)
        self.second = nn.Conv2d(4, 4, 3, **options)
        self.third = nn.Linear(8, 8)
        self.fourth = nn.Linear(8, 8)
        self.mix = nn.Parameter(
            torch.randn(4, 4, 1, 1) * torch.logspace(0, -1, 4)[:, None, None, None]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(nn.functional.conv2d(x, self.mix))).mean(dim=(2,)).flatten(1)
        logits: Tensor = self.fourth(torch.relu(self.third(x[:, :8])))
        return logits


def inputs_of(model: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    """What each layer is given, by hooks of the test's own."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, args, _out, name=name: seen.setdefault(name, []).append(args[0])
        )
        for name, module in model.named_children()
    ]
    with torch.no_grad():
        for image in images:
            model(image)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def slow_moments(module: nn.Module, x: Tensor) -> Matrix:
    """E[x·xᵀ] of a module's inputs, patch by patch."""
    values = x.double()
    if isinstance(module, nn.Linear):
        rows = list(values.reshape(-1, values.shape[-1]).numpy())
    else:
        mode = module.padding_mode
        mode = "constant" if mode == "zeros" else mode
        padded = nn.functional.pad(values, (1, 1, 1, 1), mode).numpy()
        stride = module.stride[0]
        rows = [
            sample[:, i : i + 3, j : j + 3].reshape(-1)
            for sample in padded
            for i in range(0, padded.shape[2] - 2, stride)
            for j in range(0, padded.shape[3] - 2, stride)
        ]
    total = np.zeros((len(rows[0]), len(rows[0])))
    for row in rows:
        total += np.outer(row, row)
    return total / len(rows)


def loss(before: Matrix, after: Matrix, moments: Matrix) -> float:
    """tr((K − K')·C·(K − K')ᵀ) relative to tr(K·C·Kᵀ)."""
    rest = before - after
    return float(np.trace(rest @ moments @ rest.T) / np.trace(before @ moments @ before.T))


def best_matrix(weight: Matrix, moments: Matrix, rank: int) -> float:
    """The least that a rank can lose, by an SVD of K·C½."""
    values, vectors = np.linalg.eigh(moments)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    sigma = np.linalg.svd(weight @ root, compute_uv=False)
    return float((sigma[rank:] ** 2).sum() / (sigma**2).sum())


def best_kernel(weight: Matrix, moments: Matrix, method: str, rank: tuple[int, ...]) -> float:
    """The least that was found from several random starts, for kernels (4, 4, 3, 3)."""
    if method == "tucker2":
        terms, result = ["sa", "bap", "tb"], "tsp"
        shapes = [(4, rank[0]), (rank[1], rank[0], 9), (4, rank[1])]
    else:
        terms, result, shapes = ["syr", "txr"], "tsyx", [(4, 3, rank[0]), (4, 3, rank[0])]
    values, vectors = np.linalg.eigh(moments)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    goal = (weight @ root).reshape(-1)
    best = np.inf
    for seed in range(4):
        rng = np.random.default_rng(seed)
        factors = [rng.standard_normal(shape) for shape in shapes]
        lost = np.inf
        for _ in range(400):
            for k in range(len(terms)):  # each in turn, by what each of its elements makes
                units = np.eye(factors[k].size).reshape(-1, *shapes[k])
                letters = [f"z{t}" if i == k else t for i, t in enumerate(terms)]
                parts = [units if i == k else f for i, f in enumerate(factors)]
                made = np.einsum(f"{','.join(letters)}->z{result}", *parts, optimize=True)
                design = (made.reshape(len(units), 4, -1) @ root).reshape(len(units), -1).T
                solved = np.linalg.lstsq(design, goal, rcond=None)[0]
                factors[k] = solved.reshape(shapes[k])
            before, lost = lost, float(np.sum((design @ solved - goal) ** 2))
            if before - lost <= 1e-6 * lost:
                break
        best = min(best, lost)
    return best / float(goal @ goal)


def distorted(
    model: nn.Module, method: str, rank: int | tuple[int, ...], images: list[Tensor], metric: str
) -> dict[str, tuple[Matrix, Matrix]]:
    """The weights of all layers that a method distorts, before and after it."""
    model = copy.deepcopy(model)
    twist = DeepTwist(model, method, rank, every=200, metric=metric)
    with torch.no_grad():
        for image in images:
            model(image)
    names = [d.name for d in twist.plan.replaced]
    assert names

    def weights() -> dict[str, Matrix]:
        return {
            n: model.get_submodule(n).weight.detach().double().flatten(1).numpy().copy()
            for n in names
        }

    before = weights()
    twist.finish()
    after = weights()
    return {n: (before[n], after[n]) for n in names}


@pytest.mark.parametrize(
    ("method", "rank"),
    [("svd", 3), ("channel-svd", 2), ("spatial-svd", 3), ("tucker2", (2, 3))],
)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding_mode": "reflect"}], ids=str)
def test_a_distortion_loses_least_of_what_the_layer_gives(
    method: str, rank: int | tuple[int, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(1)  # of a network whose kernels have one valley each to descend into
    model = Twins(**options).train()
    colour = torch.randn(4, 4) * torch.logspace(0, -1.2, 4)
    # As few rows as are all looked at: 16 for each of the 36 elements of a patch.
    images = [torch.einsum("nshw,ts->nthw", torch.randn(8, 4, 8, 8), colour) for _ in range(3)]
    images = [x + 0.5 for x in images]  # inputs have a mean too
    seen = inputs_of(model, images)
    by_data = distorted(model, method, rank, images, "data")
    plainly = distorted(model, method, rank, images, "weight")
    assert len(by_data) == 2
    for name, (before, after) in by_data.items():
        moments = slow_moments(model.get_submodule(name), seen[name])
        lost, plain = loss(before, after, moments), loss(before, plainly[name][1], moments)
        if isinstance(rank, int) and method != "spatial-svd":
            least = best_matrix(before, moments, rank)
            assert lost == pytest.approx(least, rel=1e-4)
        else:
            ranks = rank if isinstance(rank, tuple) else (rank,)
            least = best_kernel(before, moments, method, ranks)
            assert 0.998 * least <= lost <= 1.01 * least
        assert lost < 0.97 * plain


def test_later_distortions_lose_no_more_and_follow_the_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3)).train()
    twist = DeepTwist(model, "tucker2", (2, 3), every=2, metric="data")
    for scale in (torch.logspace(0, -1.5, 6), torch.logspace(-1.5, 0, 6)):
        model[0].weight.data += 0.2 * torch.randn_like(model[0].weight)
        images = [torch.randn(4, 6, 7, 7) * scale[:, None, None] for _ in range(2)]
        plain = copy.deepcopy(model)
        before = model[0].weight.detach().double().flatten(1).numpy().copy()
        with torch.no_grad():
            for image in images:  # the second one is looked at, or both at the beginning
                model(image)
                twist.step()
        DeepTwist(plain, "tucker2", (2, 3)).finish()
        rows = nn.functional.unfold(images[1].double(), 3).swapaxes(1, 2).reshape(-1, 54)
        moments = (rows.T @ rows / len(rows)).numpy()
        lost, usual = (
            loss(before, m[0].weight.detach().double().flatten(1).numpy(), moments)
            for m in (model, plain)
        )
        assert lost < 0.8 * usual


def test_only_a_few_batches_before_a_distortion_are_looked_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).train()
    twist = DeepTwist(model, "svd", 4, every=100, metric="data")
    looked = []
    for step in range(300):
        if model[0]._forward_pre_hooks:
            looked.append(step)
        model(torch.randn(4, 16))
        twist.step()
    assert looked == [0, 1, 98, 99, 198, 199, 298, 299]  # a fiftieth, and at the very first
    twist = DeepTwist(model, "svd", 4, every=1000, metric="data")
    model.eval()(torch.randn(4, 16))
    with pytest.raises(UsageError, match="has seen no inputs of '0': train a batch"):
        twist.finish()
    model.train()(torch.randn(4, 16))
    twist.finish()
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("every", "cut", "more"),
    [(4, 3, 3), (4, 5, 1), (200, 2, 2)],
    ids=["before a look", "sums of the last distortion", "between two looks"],
)
def test_a_run_in_the_metric_of_the_data_resumes_to_the_bit(
    every: int, cut: int, more: int
) -> None:
    images, labels = task()

    def begin() -> tuple[Net, DeepTwist]:
        torch.manual_seed(0)
        model, methods = Net(), ("tucker2", "svd")
        return model, DeepTwist(
            model, methods, 0.25, every=every, include="last|hidden", metric="data"
        )

    whole, twist = begin()
    train(whole, twist, cut, images, labels)
    saved = copy.deepcopy((whole.state_dict(), twist.state_dict()))
    train(whole, twist, more, images[32:], labels[32:])
    twist.finish()
    again, resumed = begin()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, more, images[32:], labels[32:])
    resumed.finish()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_state_without_inputs_is_refused() -> None:
    torch.manual_seed(0)
    twist = DeepTwist(Net(), ("tucker2", "svd"), 0.25, include="last|hidden", metric="data")
    state = twist.state_dict()
    for inputs in (None, {}, {"last": state["inputs"]["last"]}):
        with pytest.raises(UsageError, match="no inputs of these layers"):
            twist.load_state_dict(state | {"inputs": inputs})


@pytest.mark.parametrize("method", ["tucker2", "svd"])
def test_what_ends_in_the_metric_of_the_data_is_handed_over_without_loss(
    method: str, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model, (images, labels) = Net(), task()
    rank = (8, 6) if method == "tucker2" else 6
    twist = DeepTwist(model, method, rank, every=6, exclude="stem", metric="data")
    train(model, twist, 20, images, labels)
    twist.finish()
    path = tmp_path / "model.onnx"
    path.write_bytes(export(model, images[:4]).SerializeToString())
    result = onnxlr.optimize(path, method=method, rank="exact", max_drop=1, exclude="stem")
    replaced = {d.weight: (d.decision, d.rank) for d in result.plan.replaced}
    assert replaced == {d.weight: (d.decision, d.rank) for d in twist.plan.replaced}
    with torch.no_grad():
        wanted = model.eval()(images).numpy()
    given = run(result.model, images)
    assert np.linalg.norm(given - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_layers_and_models_whose_inputs_cannot_be_taken_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=r"'stem': expand-at-load doesn't .*; exclude it"):
        DeepTwist(Net(), "expand-at-load", 1, metric="data")
    table = nn.Sequential(nn.Embedding(64, 32))
    with pytest.raises(UsageError, match="'0': it looks its inputs up; exclude it"):
        DeepTwist(table, "embedding-svd", 4, metric="data")
    wide = nn.Sequential(nn.Linear(5000, 16))
    with pytest.raises(UsageError, match="an input has 5,000 elements, too many"):
        DeepTwist(wide, "svd", 4, metric="data")
    with pytest.raises(UsageError, match="metric='inputs': give 'weight' or 'data'"):
        DeepTwist(Net(), "svd", 4, metric="inputs")
    compiled = torch.compile(Net(), backend="eager")
    with pytest.raises(UsageError, match="don't compile the model"):
        DeepTwist(compiled, "svd", 4, metric="data")


def test_copies_of_a_model_are_not_looked_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).train()
    twist = DeepTwist(model, "svd", 4, metric="data")
    (hook,) = model[0]._forward_pre_hooks.values()
    assert isinstance(hook, InputMoments)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(4, 16))
        assert not hook.rows
        assert isinstance(factorize_(other, twist.plan)[0], nn.Sequential)
    model(torch.randn(4, 16))
    assert hook.rows == 4


@pytest.mark.parametrize(("method", "rank"), [("svd", 3), ("channel-svd", 2)])
def test_factors_of_a_plan_begin_as_what_loses_least_on_inputs(method: str, rank: int) -> None:
    torch.manual_seed(0)
    model = Twins()
    model.first.eval()  # modes are put back as they were
    colour = torch.randn(4, 4) * torch.logspace(0, -1.2, 4)
    images = [torch.einsum("nshw,ts->nthw", torch.randn(8, 4, 8, 8), colour) + 0.5] * 2
    seen = inputs_of(model, images)
    plan = DeepTwist(model, method, rank).plan
    names = [d.name for d in plan.replaced]
    assert len(names) == 2
    kept = copy.deepcopy(model)
    with pytest.raises(UsageError, match=f"inputs= has shown no inputs of '{names[0]}'"):
        factorize_(model, plan, inputs=[])
    chained = factorize_(model, plan, inputs=[(images[0],), images[1]])
    assert chained.training
    assert not chained.first.training
    for name in names:
        weight = kept.get_submodule(name).weight.detach().double().flatten(1).numpy()
        inner, outer = (
            step.weight.detach().double().flatten(1).numpy() for step in chained.get_submodule(name)
        )
        moments = slow_moments(kept.get_submodule(name), seen[name])
        lost = loss(weight, outer @ inner, moments)
        assert lost == pytest.approx(best_matrix(weight, moments, rank), rel=1e-4)


def test_twist_then_factors_goes_on_with_the_same_optimizer() -> None:
    """The way that the guide shows: finish, factorize, go on. Only the factors begin anew."""
    torch.manual_seed(0)
    model, (images, labels) = Net(), task()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 1e-3},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        0.05,
        momentum=0.9,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    twist = DeepTwist(model, ("tucker2", "svd"), 0.25, every=6, exclude="stem")

    def step(number: int) -> None:
        some = slice(16 * number % 128, 16 * number % 128 + 16)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images[some]), labels[some]))
        optimizer.step()
        scheduler.step()

    for number in range(20):
        step(number)
        twist.step()
    twist.finish()
    before = model.eval()(images)
    kept = {name: p for name, p in model.named_parameters() if "mid" not in name}
    gathered = {
        n: optimizer.state[p]["momentum_buffer"].clone()
        for n, p in kept.items()
        if n in ("stem.weight", "mid.bias", "last.bias", "head.bias", "norm.weight")
    }
    gone = model.mid.weight
    factorize_(model, twist.plan, optimizer=optimizer)
    torch.testing.assert_close(model.eval()(images), before, rtol=1e-5, atol=1e-5)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
    assert len(trained) == len(list(model.parameters()))
    assert gone not in optimizer.state
    assert len(gathered) == 4
    for name, buffer in gathered.items():
        assert torch.equal(optimizer.state[kept[name]]["momentum_buffer"], buffer)
    matrices, vectors = optimizer.param_groups
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    factors = [p for layer in (model.mid, model.last, model.head) for p in layer.parameters()]
    assert not any(p in optimizer.state for p in factors if p.ndim > 1)
    copies = [p.detach().clone() for p in factors]
    model.train()
    step(20)
    assert all(bool((p != c).any()) for p, c in zip(factors, copies, strict=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(
        0.025 * (1 + np.cos(np.pi * 21 / 40)), rel=1e-6
    )
