"""Factorized modules: what they export to, and what is left alone with its reason."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.errors import UsageError
from onnxlr.plan.plan import KEEP, Plan

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

from onnxlr.training import DeepTwist, factorize_  # noqa: E402
from onnxlr.training.modules import module_layers  # noqa: E402
from tests.support.training import Net, export, exported, run, task, traced, train  # noqa: E402

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
        path,
        method=method,
        rank="exact",
        max_drop=1,
        exclude="stem",
        expand_at_load=expands,
        measure=False,
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


def shapes_of(program: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of what was traced."""
    return {name: tuple(weight.shape) for name, weight in program.state_dict.items()}


SAME_GRAPH = ("svd", "channel-svd", "input-channel-svd", "spatial-svd", "tucker2", "cp", "cp3")


@cache
def trained(norm: bool) -> tuple[Net, onnx.ModelProto]:
    """The network after three steps, so that a normalization has statistics, and its export."""
    torch.manual_seed(0)
    model, (images, labels) = Net(norm), task(16)
    train(model, None, 3, images, labels)
    return model, export(model, images[:4])


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("method", SAME_GRAPH)
def test_a_factorized_module_exports_as_the_plan_makes_of_the_export(
    method: str, norm: bool, tmp_path: Path
) -> None:
    images, labels = task(16)
    model, proto = trained(norm)
    model = copy.deepcopy(model)
    path, plan = tmp_path / "model.onnx", tmp_path / "plan.json"
    onnx.save(proto, path)
    result = onnxlr.optimize(path, method=method, rank=4, max_drop=1, measure=False)
    plan.write_text(result.plan.to_json())
    assert result.plan.replaced
    replayed = onnxlr.apply(plan, path)
    chained = factorize_(model, plan)
    assert chained is model
    program = traced(model, images[:4])
    made = exported(program)

    def said(proto: onnx.ModelProto) -> list[tuple[Any, ...]]:
        # Two spellings of attributes that are as by default: an empty list of pads is all zeros.
        return [
            (op, reads, [(k, v) for k, v in attributes if v not in ({0}, {1})])
            for op, reads, attributes in shape_of(proto)
        ]

    assert said(made) == said(replayed)
    if not norm:
        expected, got = run(replayed, images), run(made, images)
        assert np.abs(expected - got).max() <= 1e-5 * np.abs(expected).max()
    # It trains.
    before = [p.detach().clone() for p in model.parameters()]
    train(model, None, 3, images, labels)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    # Its export is as before: torch makes it of the same operators, of weights of the same shapes.
    after = traced(model, images[:4])
    assert after.graph_module.code == program.graph_module.code
    assert str(after.graph_signature) == str(program.graph_signature)
    assert shapes_of(after) == shapes_of(program)


class Tokens(nn.Module):
    """Linear layers on more than two axes, whose weights an exporter transposes and renames."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 30)
        self.up = nn.Linear(30, 30)
        self.down = nn.Linear(30, 30)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.table(x))))  # (N, T) -> (N, T, 30)
        return y


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("method", "rank"), [("svd", "4"), ("tiled-svd", "1,2,3")])
def test_weights_without_their_names_are_known_by_value(
    method: str, rank: str, copied: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, path = Tokens(), tmp_path / "model.onnx"
    x = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(0))
    if copied:  # as the blocks of nn.TransformerEncoder begin
        model.down.load_state_dict(model.up.state_dict())
    exported = export(model, x)
    exported.ir_version = 9  # whose nodes can't say what module they are from
    for node in exported.graph.node:
        del node.metadata_props[:]
    onnx.save(exported, path)
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


def test_factors_beyond_half_precision() -> None:
    """Whose weights are within it."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).half()
    model[0].weight.data[:] = torch.where(torch.rand(32, 64) < 0.5, -6e4, 6e4)
    plan = DeepTwist(model, "svd", 4).plan
    with pytest.raises(onnxlr.ModelError, match="beyond what torch"):
        factorize_(model, plan)
    assert isinstance(model[0], nn.Linear)


def test_a_plan_of_modules_is_a_plan() -> None:
    plan = DeepTwist(Net(), "svd", 4).plan
    assert Plan.from_json(plan.to_json()) == plan
