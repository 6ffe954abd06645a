"""Chains as modules: every method on every module that it takes."""

import copy
from collections.abc import Callable, Iterator

import pytest

from onnxlr.methods.registry import find_pass, installed_passes

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

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


# One module has no sibling, and modules of recurrent operators aren't selected.
WITHOUT = ("expand-at-load", "shared-svd", "input-svd")
CHAINS = [name for name in installed_passes() if name not in WITHOUT]


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
