"""onnxlr.training: chains as modules, DeepTwist, and what is exported in the end."""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnxlr
from onnxlr.errors import ModelError, UsageError
from onnxlr.methods.cost import weight_error
from onnxlr.methods.registry import find_pass, installed_passes
from onnxlr.plan.plan import KEEP, Plan

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402
from torch.optim import Optimizer  # noqa: E402

from onnxlr.training import DeepTwist, factorize_  # noqa: E402
from onnxlr.training.modules import ModuleLayer, module_layers  # noqa: E402

RNG = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG)


def ids(*shape: int) -> Tensor:
    return torch.randint(40, shape, generator=RNG)


# Every module that a pass may take, in the shapes and with the attributes that it may have.
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(24, 16), lambda: rand(5, 24)),
    "linear on three axes": (lambda: nn.Linear(24, 16, bias=False), lambda: rand(2, 3, 24)),
    "embedding": (lambda: nn.Embedding(40, 16), lambda: ids(2, 7)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 5, padding=2, dilation=2), lambda: rand(2, 16, 30)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, padding=1), lambda: rand(2, 16, 9, 7)),
    "strided": (
        lambda: nn.Conv2d(16, 24, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1)),
        lambda: rand(2, 16, 11, 9),
    ),
    "groups": (
        lambda: nn.Conv2d(16, 32, 3, padding=1, groups=2, bias=False),
        lambda: rand(2, 16, 8, 8),
    ),
    "same": (lambda: nn.Conv2d(16, 24, (2, 4), padding="same"), lambda: rand(2, 16, 8, 7)),
    "valid": (lambda: nn.Conv2d(16, 24, 3, padding="valid"), lambda: rand(2, 16, 8, 7)),
    "circular": (
        lambda: nn.Conv2d(16, 24, 3, padding=(1, 2), padding_mode="circular"),
        lambda: rand(2, 16, 8, 7),
    ),
    "reflect": (
        lambda: nn.Conv2d(16, 24, (2, 4), padding="same", padding_mode="reflect"),
        lambda: rand(2, 16, 8, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(8, 16, (3, 2, 3), padding=1), lambda: rand(1, 8, 5, 6, 5)),
    "transposed": (
        lambda: nn.ConvTranspose2d(16, 24, 4, stride=2, padding=1, output_padding=1),
        lambda: rand(2, 16, 5, 6),
    ),
    "transposed groups": (
        lambda: nn.ConvTranspose1d(16, 24, 5, stride=3, groups=2),
        lambda: rand(2, 16, 8),
    ),
}
CHAINS = [name for name in installed_passes() if name != "expand-at-load"]


def layer_of(module: nn.Module) -> ModuleLayer:
    (item,) = module_layers(nn.Sequential(module))
    assert isinstance(item, ModuleLayer)
    return item


def fitting() -> Iterator[tuple[str, str]]:
    for name, (make, _) in MODULES.items():
        layer = layer_of(make()).layer
        for method in CHAINS:
            if layer.refusal is None and find_pass(method).refuse(layer) is None:
                yield name, method


FITTING = list(fitting())


def test_all_methods_take_a_module() -> None:
    assert {method for _, method in FITTING} == set(CHAINS)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's, of speed
@pytest.mark.parametrize(("name", "method"), FITTING)
def test_a_chain_computes_what_its_composed_weight_does(name: str, method: str) -> None:
    torch.manual_seed(0)
    make, sample = MODULES[name]
    model = nn.Sequential(make()).double()
    x = sample()
    x = x if name == "embedding" else x.double()
    plan = DeepTwist(model, method, 1).plan
    (decision,) = plan.replaced
    assert decision.rank is not None
    chain = factorize_(copy.deepcopy(model), plan)
    (item,) = module_layers(model)
    assert isinstance(item, ModuleLayer)
    graph_pass, layer = find_pass(method), item.read()
    factors = graph_pass.factorize(layer, decision.rank)
    item.write(graph_pass.compose(layer, decision.rank, factors))
    expected = model(x)
    outputs = chain(x)
    assert outputs.shape == expected.shape
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
    assert all(m.training for m in chain.modules())
    assert not any(m.training for m in factorize_(copy.deepcopy(model).eval(), plan).modules())
    # Its parameters are the factors and the bias, and all of them train.
    bias = getattr(model[0], "bias", None)
    stored = sum(p.numel() for p in chain.parameters())
    assert stored == decision.params_after + (0 if bias is None else bias.numel())
    torch.autograd.backward(outputs.square().sum())
    assert all(p.grad is not None and bool(p.grad.any()) for p in chain.parameters())


class Net(nn.Module):
    """A normalized stem, two more convolutions, two linear layers."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(24) if norm else nn.Identity()
        self.mid = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=not norm)
        self.again = nn.BatchNorm2d(32) if norm else nn.Identity()
        self.last = nn.Conv2d(32, 24, 3, padding=1)
        self.hidden = nn.Linear(96, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))  # (N, 3, 12, 12) -> (N, 24, 12, 12)
        x = torch.relu(self.again(self.mid(x)))  # -> (N, 32, 6, 6)
        x = torch.relu(self.last(x))  # -> (N, 24, 6, 6)
        x = nn.functional.avg_pool2d(x, 3).flatten(1)  # -> (N, 96)
        logits: Tensor = self.head(torch.relu(self.hidden(x)))  # -> (N, 10)
        return logits


def export(model: nn.Module, x: Tensor) -> onnx.ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.onnx.export(
            copy.deepcopy(model).eval(),
            (x,),
            dynamo=True,
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    proto: onnx.ModelProto = program.model_proto
    return proto


def run(model: onnx.ModelProto, x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x.numpy()})[0])


def train(
    model: nn.Module, twist: DeepTwist | None, steps: int, images: Tensor, labels: Tensor
) -> Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for step in range(steps):
        some = slice(16 * step % len(images), 16 * step % len(images) + 16)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images[some]), labels[some]))
        optimizer.step()
        if twist is not None:
            twist.step()
    return optimizer


def task(count: int = 128) -> tuple[Tensor, Tensor]:
    """Noise around a pattern a class: learnt in a few steps."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(10, 3, 12, 12, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(count, 3, 12, 12, generator=generator), labels


HAND_OVER: dict[str, int | tuple[int, ...]] = {
    "svd": 6,
    "tiled-svd": (3, 2, 2),
    "channel-svd": 6,
    "spatial-svd": 8,
    "tucker2": (8, 6),
    "cp": 40,  # beyond the channels
    "cp3": 30,
    "expand-at-load": (4, 1, 1),
}


@pytest.mark.parametrize("method", HAND_OVER)
def test_what_was_twisted_is_factorized_without_loss(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (images, labels) = Net(), task()
    twist = DeepTwist(model, method, HAND_OVER[method], every=6, exclude="stem")
    train(model, twist, 20, images, labels)
    twist.finish()
    trained = {d.weight: (d.decision, d.rank) for d in twist.plan.replaced}
    assert trained

    proto = export(model, images[:4])
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    expands = method == "expand-at-load"
    result = onnxlr.optimize(
        path, method=method, rank="exact", max_drop=1, exclude="stem", expand_at_load=expands
    )
    replaced = {d.weight: (d.decision, d.rank) for d in result.plan.replaced}
    if not expands:  # other methods of the same rank may take over
        assert replaced == trained
    before, after = run(proto, images), run(result.model, images)
    assert np.linalg.norm(before - after) <= 1e-5 * np.linalg.norm(before)
    assert (before.argmax(1) == after.argmax(1)).all()
    saved = sum(d.params_before - d.params_after for d in twist.plan.replaced)
    assert result.report.input.params - result.report.output.params == saved


def shape_of(model: onnx.ModelProto) -> list[tuple[Any, ...]]:
    """Operators in order, with their attributes and the shapes of what they read."""
    stored = {t.name: tuple(t.dims) for t in model.graph.initializer}
    made: dict[str, int] = {v.name: -1 for v in model.graph.input}
    rows = []
    for i, node in enumerate(model.graph.node):
        reads = [stored.get(name, made.get(name)) for name in node.input if name]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        # What an operator takes for granted may be said or not.
        for name, usual in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("group", 1)):
            if attributes.get(name) == usual:
                del attributes[name]
        if attributes.get("auto_pad") == b"NOTSET":
            del attributes["auto_pad"]
        for name in ("strides", "dilations", "pads"):
            if len(set(attributes.get(name, ()))) == 1:
                attributes[name] = {attributes[name][0]}
        rows.append((node.op_type, reads, sorted(attributes.items(), key=str)))
        made |= dict.fromkeys(node.output, i)
    return rows


SAME_GRAPH = ("svd", "channel-svd", "input-channel-svd", "spatial-svd", "tucker2", "cp", "cp3")


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("method", SAME_GRAPH)
def test_a_factorized_module_exports_as_the_plan_makes_of_the_export(
    method: str, norm: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, (images, labels) = Net(norm), task(16)
    train(model, None, 3, images, labels)  # with a normalization
    path, plan = tmp_path / "model.onnx", tmp_path / "plan.json"
    onnx.save(export(model, images[:4]), path)
    result = onnxlr.optimize(path, method=method, rank=4, max_drop=1)
    plan.write_text(result.plan.to_json())
    assert result.plan.replaced
    replayed = onnxlr.apply(plan, path)
    chained = factorize_(model, plan)
    assert chained is model
    exported = export(model, images[:4])

    def said(proto: onnx.ModelProto) -> list[tuple[Any, ...]]:
        # Two spellings of attributes that are as by default: an empty list of pads is all zeros.
        return [
            (op, reads, [(k, v) for k, v in attributes if v not in ({0}, {1})])
            for op, reads, attributes in shape_of(proto)
        ]

    assert said(exported) == said(replayed)
    if not norm:
        expected, got = run(replayed, images), run(exported, images)
        assert np.abs(expected - got).max() <= 1e-5 * np.abs(expected).max()
    # It trains.
    before = [p.detach().clone() for p in model.parameters()]
    train(model, None, 3, images, labels)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert said(export(model, images[:4])) == said(replayed)


class Tokens(nn.Module):
    """Linear layers on more than two axes, whose weights an exporter transposes and renames."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 24)
        self.up = nn.Linear(24, 24)
        self.down = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.table(x))))  # (N, T) -> (N, T, 24)
        return y


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("method", "rank"), [("svd", "4"), ("tiled-svd", "2,2,3")])
def test_weights_without_their_names_are_known_by_value(
    method: str, rank: str, copied: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, path = Tokens(), tmp_path / "model.onnx"
    x = ids(2, 5)
    if copied:  # as the blocks of nn.TransformerEncoder begin
        model.down.load_state_dict(model.up.state_dict())
    onnx.save(export(model, x), path)
    result = onnxlr.optimize(path, method=method, rank=rank, max_drop=1, target="params")
    # The exporter stores equal weights as one.
    assert len(result.plan.replaced) == (1 if copied else 2)
    with pytest.raises(UsageError, match=r"no module of the model is called: name the exported"):
        factorize_(model, result.plan)
    factorize_(model, result.plan, exported=path)
    assert not isinstance(model.up, nn.Linear)
    assert not isinstance(model.down, nn.Linear)
    expected = run(result.model, x)
    got = model(x).detach().numpy()
    assert np.abs(expected - got).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(UsageError, match="no module of the model has the weight"):
        factorize_(Tokens(), result.plan, exported=path)


def test_a_plan_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    plan = DeepTwist(model, "tucker2", 4).plan
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(what: Any, words: str, plan: Any = plan) -> None:
        with pytest.raises(UsageError, match=words):
            factorize_(what, plan)

    wide = Net()
    wide.mid = nn.Conv2d(24, 40, 3)
    refused(wide, r"'mid' has shape \(32, 24, 3, 3\), the model's 'mid' has \(40, 24, 3, 3\)")
    refused(nn.Sequential(), "which no module of the model is called")
    refused(nn.Conv2d(24, 32, 3), "put it in a Sequential", DeepTwist(nn.Conv2d(24, 32, 3)).plan)
    refused(model, "train it with DeepTwist", DeepTwist(model, "expand-at-load", 4).plan)
    refused(torch.compile(model, backend="eager"), "before it is compiled")
    refused(model, "can't read the plan", tmp_path / "none.json")
    refused(model, "give a Plan, or the path of one", 3)
    refused("model", "give a torch.nn.Module")
    hooked = Net()
    hooked.last.register_forward_hook(lambda *_: None)
    refused(hooked, "it has hooks")
    odd = Odd()
    refused(odd, "'tied.weight' is the same weight", DeepTwist(odd, "svd", 4, include="good").plan)

    class Frame(nn.TransformerEncoderLayer):
        """One that the user wrote."""

    frame = Frame(16, 2, 64)
    refused(frame, "reads its weight itself", DeepTwist(frame, "svd", 2, include="linear1").plan)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {type(m) for m in model.children()} == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}


class Odd(nn.Module):
    """Weights that nothing can take, beside one that a pass can."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(32, 32)
        self.tied = nn.Linear(32, 32)
        self.tied.weight = self.good.weight
        self.normed = parametrizations.weight_norm(nn.Linear(32, 32))
        self.lstm = nn.LSTM(32, 8)
        self.lazy = nn.LazyLinear(8)
        self.moving = nn.Embedding(64, 32, max_norm=1.0)
        self.small = nn.Linear(3, 3)
        self.conv = nn.Conv2d(32, 32, 1)


def test_what_is_left_alone_is_listed_with_its_reason() -> None:
    twist = DeepTwist(Odd(), "svd", 4, exclude="conv")
    reasons = {d.name: d.reason for d in twist.plan.decisions if d.decision == KEEP}
    assert [d.name for d in twist.plan.replaced] == ["good"]
    for name, words in {
        "tied": "shares its weight with 'good'",
        "normed": "computed from other parameters",
        "lstm.weight_ih_l0": "LSTM is no Linear",
        "lazy": "run a batch first",
        "moving": "max_norm",
        "small": "saves anything",
        "conv": "--exclude conv",
    }.items():
        assert words in reasons[name], reasons[name]
    assert repr(twist) == "DeepTwist(1 layers by svd every 200 steps, 10 left alone, 0 steps done)"


class Standardized(nn.Conv2d):
    """Convolves with another weight than its parameter."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(x, weight - weight.mean(), bias)
        return y


def test_weights_that_cannot_be_taken_have_their_reason() -> None:
    def reason(module: nn.Module) -> str:
        layers = [m for m in module_layers(nn.Sequential(module)) if m.name == "0"]
        assert len(layers) == 1
        return getattr(layers[0], "reason", "")

    assert reason(nn.Linear(8, 8)) == ""
    assert "computes in a way of its own" in reason(Standardized(8, 8, 3))
    patched = nn.Linear(8, 8)
    patched.forward = lambda x: x
    assert "computes in a way of its own" in reason(patched)
    assert "no values yet" in reason(nn.Linear(8, 8, device="meta"))
    with torch.inference_mode():
        assert "made for inference" in reason(nn.Linear(8, 8))
    expanded = nn.Linear(8, 8)
    expanded.weight = nn.Parameter(torch.zeros(1, 8).expand(8, 8))
    assert "expanded" in reason(expanded)
    narrow = nn.Linear(8, 8)
    narrow.weight = nn.Parameter(narrow.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert "stored as torch.float8_e4m3fn" in reason(narrow)
    frozen = nn.Sequential(nn.Linear(32, 32).requires_grad_(False), nn.Linear(32, 32))
    (decision, _) = DeepTwist(frozen, "svd", 4).plan.decisions
    assert (decision.decision, decision.reason[:12]) == (KEEP, "it is frozen")


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


def test_one_image_may_come_without_its_batch() -> None:
    torch.manual_seed(0)
    for method in ("tiled-svd", "tucker2", "slice-svd"):
        model = nn.Sequential(nn.Conv2d(16, 16, 3))
        twist = DeepTwist(model, method, 1)
        twist.finish()
        x = rand(16, 8, 8)
        expected = model(x)
        outputs = factorize_(model, twist.plan)(x)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


def test_a_factorized_table_looks_up_as_it_did() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 16, padding_idx=3, sparse=True))
    chain = factorize_(model, DeepTwist(model, "embedding-svd", 4).plan)[0]
    assert (chain[0].padding_idx, chain[0].sparse) == (3, True)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.arange(40)).square().sum() / 40)
        optimizer.step()
    assert not bool(model(torch.tensor([3])).any())


@pytest.mark.parametrize("method", ["cp", "cp3", "tucker2"])
def test_components_that_died_come_back(method: str) -> None:
    torch.manual_seed(0)
    parts = [torch.einsum("t,s,i,j->tsij", *(rand(n) for n in (16, 16, 3, 3))) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    model[0].weight.data.zero_()
    twist = DeepTwist(model, method, 4)
    twist.distort()  # nothing but zeros
    for count in (2, 4):
        for _ in range(3):
            model[0].weight.data = torch.stack(parts[:count]).sum(0)
            twist.distort()
        (decision,) = twist.plan.replaced
        assert decision.error is not None
        assert decision.error < 0.02


def test_layers_are_chosen_by_name_or_by_a_function() -> None:
    def names(**where: Any) -> list[str]:
        return [d.name for d in DeepTwist(Net(), "svd", 4, **where).plan.replaced]

    assert names() == ["hidden", "head"]
    assert names(include="hid") == names(exclude="^head$") == ["hidden"]
    assert names(include=lambda _, m: m.weight.shape == (10, 48)) == ["head"]
    assert names(exclude=lambda name, _: name == "head") == ["hidden"]
    # Several methods share out the layers among them.
    both = DeepTwist(Net(), ("svd", "tucker2"), 0.25).plan
    assert {d.name: d.decision for d in both.replaced} == {
        "stem": "tucker2",
        "mid": "tucker2",
        "last": "tucker2",
        "hidden": "svd",
        "head": "svd",
    }


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


def test_factors_beyond_half_precision() -> None:
    """Whose weights are within it."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).half()
    model[0].weight.data[:] = torch.where(torch.rand(32, 64) < 0.5, -6e4, 6e4)
    plan = DeepTwist(model, "svd", 4).plan
    with pytest.raises(onnxlr.ModelError, match="beyond what torch"):
        factorize_(model, plan)
    assert isinstance(model[0], nn.Linear)


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


def _worker(rank: int, folder: str, broken: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
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
    result = {"weights": weights, "message": message, "plan": plan, "other": other}
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_every_process_ends_with_the_same_weights(broken: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path), broken), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert "different layers" in first["other"]
    assert "different layers" in second["other"]
    if broken:
        assert "'head' holds" in first["message"]
        assert second["message"] == first["message"]
        return
    assert not first["message"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert first["plan"] == second["plan"]
    rank = torch.linalg.matrix_rank(first["weights"]["hidden.weight"].double(), rtol=1e-6)
    assert int(rank) == 12


def test_a_plan_of_modules_is_a_plan() -> None:
    plan = DeepTwist(Net(), "svd", 4).plan
    assert Plan.from_json(plan.to_json()) == plan


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
