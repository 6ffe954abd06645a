"""DeepTwist: weights that follow their low rank, runs that resume, and states that are refused."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from onnxlr.errors import ModelError, UsageError
from onnxlr.methods.cost import weight_error
from onnxlr.methods.registry import find_pass

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402
from torch.optim import Optimizer  # noqa: E402

from onnxlr.training import DeepTwist, factorize_  # noqa: E402
from onnxlr.training.modules import ModuleLayer, module_layers  # noqa: E402
from tests.support.training import Net, task, train  # noqa: E402


def test_what_is_left_alone_is_not_touched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(32, 32)), nn.Linear(32, 32))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    DeepTwist(model, "svd", 4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_that_changed_is_not_twisted_in_silence() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    twist = DeepTwist(model, "svd", 4)
    model[1] = nn.Linear(32, 32)
    with pytest.raises(UsageError, match="the module '1' was replaced"):
        twist.finish()
    twist = DeepTwist(model, "svd", 4)
    parametrizations.weight_norm(model[0])
    with pytest.raises(UsageError, match="'0' has changed: its weight is computed"):
        twist.finish()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, r"every=2\.5"),
        ({"rank": "auto"}, "name a rank"),
        ({"rank": "many"}, "is not a rank"),
        ({"rank": (1, 2, 3, 4)}, "is not a rank"),
        ({"method": "qr"}, "'qr' is not installed"),
        ({"method": 3}, "give the name of a method"),
        ({"method": []}, "give the name of a method"),
        ({"include": 3}, "give an expression or a function"),
        ({"include": "nowhere"}, "no layer of the model can be distorted: stem: not named"),
        ({"include": "("}, "not a regular expression"),
        ({"method": "svd", "rank": "evbmf", "include": "hidden"}, r"hidden: svd: evbmf .*rank 0"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=words):
        DeepTwist(Net(), **arguments)


def test_every_so_many_steps_and_at_the_end() -> None:
    torch.manual_seed(0)
    model, (images, labels) = Net(), task()
    twist = DeepTwist(model, "tucker2", (8, 6), every=3, exclude="stem")
    for step in range(1, 8):
        train(model, None, 1, images, labels)
        weight = model.mid.weight.detach().clone()
        assert twist.step() == (step % 3 == 0)
        assert torch.equal(weight, model.mid.weight) != (step % 3 == 0)
    twist.finish()
    for layer, (inputs, outputs) in ((model.mid, (8, 6)), (model.last, (8, 6))):
        weight = layer.weight.detach().double()
        modes = weight.transpose(0, 1).flatten(1), weight.flatten(1)
        ranks = [int(torch.linalg.matrix_rank(m, rtol=1e-6)) for m in modes]
        assert ranks == [inputs, outputs]
    (first, *_) = twist.plan.replaced
    assert first.error is not None
    assert 0 < first.error < 1


@pytest.mark.parametrize("method", ["tucker2", "cp", "cp3"])
def test_following_a_weight_is_as_good_as_decomposing_it_anew(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(24, 24, 3) for _ in range(3)), nn.Conv2d(24, 20, 3))
    for conv in model:  # what trained kernels are like: a decaying spectrum
        scale = torch.logspace(0, -1.5, 24).reshape(1, -1, 1, 1)
        conv.weight.data *= scale * torch.logspace(0, -1.5, len(conv.weight)).reshape(-1, 1, 1, 1)
    warm = DeepTwist(model, method, 8)
    warm.distort()
    for conv in model:
        conv.weight.data += 0.1 * conv.weight.std() * torch.randn_like(conv.weight)
    anew = []
    for item in module_layers(model):
        assert isinstance(item, ModuleLayer)
        graph_pass, layer = find_pass(method), item.read()
        rank = (8,) * len(graph_pass.full_rank(layer))
        factors = graph_pass.factorize(layer, rank)
        anew.append(weight_error(layer, graph_pass, rank, factors))
    warm.distort()
    for decision, error in zip(warm.plan.replaced, anew, strict=True):
        assert decision.error is not None
        assert decision.error <= 1.03 * error


def test_a_resumed_run_ends_as_if_never_cut() -> None:
    images, labels = task()

    def begin() -> tuple[Net, DeepTwist]:
        torch.manual_seed(0)
        model = Net()
        return model, DeepTwist(model, "tucker2", (8, 6), every=4)

    whole, twist = begin()
    optimizer = train(whole, twist, 6, images, labels)
    state = {
        "model": whole.state_dict(),
        "optimizer": optimizer.state_dict(),
        "twist": twist.state_dict(),
    }
    saved = copy.deepcopy(state)

    def finish(model: Net, twist: DeepTwist, optimizer: Optimizer) -> None:
        for step in range(6):
            some = slice(16 * step, 16 * step + 16)
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(images[some]), labels[some]))
            optimizer.step()
            twist.step()
        twist.finish()

    finish(whole, twist, optimizer)
    again, resumed = begin()
    other = torch.optim.SGD(again.parameters(), 0.05, momentum=0.9)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["twist"])
    finish(again, resumed, other)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_state_of_another_model_is_refused() -> None:
    twist = DeepTwist(Net(), "svd", 4)
    state = twist.state_dict()
    twist.finish()
    made = twist.state_dict()
    for broken, words in (
        ({}, "no state of a DeepTwist"),
        ({"steps": 1, "layers": {"other": state["layers"]["head"]}}, "of other layers"),
        (
            {"steps": 1, "layers": {n: r | {"rank": [99]} for n, r in state["layers"].items()}},
            "doesn't fit 'hidden'",
        ),
        (
            {
                "steps": 1,
                "layers": {
                    n: r | {"factors": [torch.zeros(4, 4)] * 2} for n, r in state["layers"].items()
                },
            },
            r"factors have shapes",
        ),
        ({"steps": math.inf, "layers": state["layers"]}, "no state of a DeepTwist"),
        ({"steps": -5, "layers": state["layers"]}, "no state of a DeepTwist"),
        (
            {"steps": 1, "layers": {n: r | {"rank": ["4"]} for n, r in state["layers"].items()}},
            "no state of a DeepTwist",
        ),
        (
            {
                "steps": 1,
                "layers": {
                    n: r | {"factors": [torch.zeros(1, device="meta")] * 2}
                    for n, r in state["layers"].items()
                },
            },
            "no state of a DeepTwist",
        ),
        (
            {
                "steps": 1,
                "layers": {
                    n: r | {"factors": [f * math.nan for f in r["factors"]]}
                    for n, r in made["layers"].items()
                },
            },
            "aren't finite",
        ),
        (
            {"steps": 1, "layers": {n: r | {"method": "qr"} for n, r in state["layers"].items()}},
            "not installed",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            twist.load_state_dict(broken)


def test_the_ranks_of_a_state_win() -> None:
    torch.manual_seed(0)
    first = DeepTwist(Net(), "svd", 4)
    second = DeepTwist(Net(), "svd", 6)
    second.load_state_dict(first.state_dict())
    assert [d.rank for d in second.plan.replaced] == [(4,), (4,)]


def test_a_weight_that_is_no_number_stops_before_any_is_changed() -> None:
    torch.manual_seed(0)
    model = Net()
    twist = DeepTwist(model, ("svd", "tucker2"), 0.25)
    model.head.weight.data[2, 3] = torch.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for distort in (twist.distort, twist.finish):
        with pytest.raises(ModelError, match=r"'head' holds 1 NaN .* out of 480: go back"):
            distort()
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "head.weight"
    )


def test_models_that_are_compiled_or_of_half_precision() -> None:
    torch.manual_seed(0)
    images, labels = task(32)
    model = Net()
    compiled = torch.compile(model, backend="eager")
    twist = DeepTwist(compiled, "tucker2", (8, 6), every=2, exclude="stem")
    assert [d.name for d in twist.plan.replaced] == ["mid", "last"]
    optimizer = torch.optim.SGD(compiled.parameters(), 0.05)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        twist.step()
    rank = torch.linalg.matrix_rank(model.mid.weight.detach().flatten(1).double(), rtol=1e-6)
    assert int(rank) == 6
    with torch.no_grad():  # what is compiled sees the weights as they are now
        torch.testing.assert_close(compiled.eval()(images), model.eval()(images))

    half = Net().bfloat16()
    DeepTwist(half, "tucker2", (8, 6), exclude="stem").finish()
    assert half.mid.weight.dtype == torch.bfloat16
    chained = factorize_(half, DeepTwist(half, "tucker2", (8, 6), exclude="stem").plan)
    assert {p.dtype for p in chained.parameters()} == {torch.bfloat16}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    for name in ("whole", "broken"):
        torch.save(_twisted(rank, name == "broken"), f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _twisted(rank: int, broken: bool) -> dict[str, Any]:
    """What a process has after training, with a weight that isn't finite or without."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    twist = DeepTwist(model, ("tucker2", "svd"), 0.25, every=2, exclude="stem")
    images, labels = task(64)
    images, labels = images[rank::2], labels[rank::2]  # a share each
    train(model, twist, 5, images, labels)
    if broken and rank == 0:  # in the process that decomposes alone
        model.module.head.weight.data[0, 0] = torch.inf
    message = ""
    try:
        twist.finish()
    except ModelError as error:
        message = str(error)
    weights = {k: v for k, v in model.module.state_dict().items() if "running" not in k}
    plan = twist.plan.to_json()
    two = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    other = ""
    try:  # another layer in each process
        DeepTwist(two, "svd", 4, include=str(rank)).distort()
    except UsageError as error:
        other = str(error)
    return {"weights": weights, "message": message, "plan": plan, "other": other}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes that train together left what they ended with."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", ["whole", "broken"])
def test_every_process_ends_with_the_same_weights(name: str, two_processes: Path) -> None:
    first, second = (torch.load(two_processes / f"{name}-{rank}.pt") for rank in (0, 1))
    assert "different layers" in first["other"]
    assert "different layers" in second["other"]
    if name == "broken":
        assert "'head' holds" in first["message"]
        assert second["message"] == first["message"]
        return
    assert not first["message"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert first["plan"] == second["plan"]
    rank = torch.linalg.matrix_rank(first["weights"]["hidden.weight"].double(), rtol=1e-6)
    assert int(rank) == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    model, (images, labels) = Net().cuda(), task(64)
    twist = DeepTwist(model, ("tucker2", "svd"), 0.25, every=2, exclude="stem")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cuda")
    for _ in range(5):
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(images.cuda()), labels.cuda())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        twist.step()
    twist.load_state_dict(twist.state_dict())
    twist.finish()
    assert model.hidden.weight.device.type == "cuda"
    rank = torch.linalg.matrix_rank(model.hidden.weight.detach().cpu().double(), rtol=1e-6)
    assert int(rank) == 12
    expected = model.eval()(images.cuda())
    outputs = factorize_(model, twist.plan)(images.cuda())
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-3)
