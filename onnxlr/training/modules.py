"""Modules of PyTorch as the layers that graph passes take: one node around a weight."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from onnxlr.errors import ModelError, UsageError
from onnxlr.layers.find import find_layers
from onnxlr.layers.layer import Layer

OPSET = 18
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED = (nn.Linear, nn.Embedding, *_CONVS, *_TRANSPOSED)
Predicate = Callable[[str, nn.Module], bool]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {torch.float64: ir.DataType.DOUBLE}  # all others are fitted in float32


@dataclass(frozen=True, eq=False)
class ModuleLayer:
    """A module whose weight a pass may factorize.

    Attributes
    ----------
    name : str
        Its path in the model.
    module : torch.nn.Module
    layer : Layer
        One node as the exporter writes it, around the weight; without sizes of images.
    """

    name: str
    module: nn.Module
    layer: Layer

    def check(self) -> None:
        """Hold the weight against NaN and infinity.

        Raises
        ------
        ModelError
            If it holds any.
        UsageError
            If the module no longer owns it.
        """
        if reason := _refusal(self.module, "weight", self.module._parameters.get("weight")):
            raise UsageError(f"{self.name!r} has changed: {reason}")
        weight = self.module.weight.detach()
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        if bad:
            raise ModelError(
                f"the weight of {self.name!r} holds {bad} NaN or infinite values out of "
                f"{weight.numel()}: go back to the last good checkpoint, and train on with a lower "
                "learning rate"
            )

    def read(self) -> Layer:
        """The layer with a copy of the weight as it is now.

        Raises
        ------
        ModelError
            If it holds NaN or infinity.
        """
        self.check()
        self.layer.weight.const_value = ir.Tensor(_array(self.module.weight))
        return self.layer

    def forget(self) -> None:
        """Drop the copy of the weight."""
        self.layer.weight.const_value = None

    def write(self, weight: NDArray[np.float64]) -> None:
        """Replace the weight in place; its type and its device stay."""
        with torch.no_grad():
            self.module.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))


@dataclass(frozen=True)
class Refused:
    """A module with a weight that no pass can take, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module, without the wrappers that compile it or spread it over devices."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def module_layers(model: nn.Module) -> Iterator[ModuleLayer | Refused]:
    """Every module of a model that has a weight of two axes or more, in the model's order.

    Parameters
    ----------
    model : torch.nn.Module
        As it is trained; wrappers that compile or distribute it are looked through.

    Raises
    ------
    UsageError
        If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}: give a torch.nn.Module")
    owners: dict[int, str] = {}
    for name, module in unwrapped(model).named_modules():
        for key, weight in _weights(module):
            reason = _refusal(module, key, weight)
            first = owners.setdefault(id(weight), name) if reason is None else name
            if first != name:
                reason = f"it shares its weight with {first!r}, which speaks for both"
            if reason is None:
                yield ModuleLayer(name, module, _layer(name, module))
            else:
                path = name if key == "weight" else f"{name}.{key}".lstrip(".")
                shaped = weight is not None and not isinstance(weight, UninitializedParameter)
                shape = tuple(weight.shape) if shaped else ()
                yield Refused(path, type(module).__name__, shape, reason)


def geometry(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """Attributes of a convolution's node. A padding that isn't of zeros stands before the node."""
    kernel, dilation = module.kernel_size, module.dilation
    before, after = padding(module)
    if module.padding_mode != "zeros":
        before = after = (0,) * len(kernel)
    attributes: dict[str, int | tuple[int, ...]] = {
        "kernel_shape": tuple(kernel),
        "strides": tuple(module.stride),
        "dilations": tuple(dilation),
        "group": module.groups,
        "pads": (*before, *after),
    }
    if isinstance(module, _TRANSPOSED):
        attributes["output_padding"] = tuple(module.output_padding)
    return attributes


def padding(module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows added before and after, an entry each spatial axis."""
    if module.padding == "valid":
        zeros = (0,) * len(module.kernel_size)
        return zeros, zeros
    if module.padding == "same":
        spans = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return tuple(s // 2 for s in spans), tuple(s - s // 2 for s in spans)
    return tuple(module.padding), tuple(module.padding)


def computes_as_its_class(module: nn.Module) -> bool:
    """Whether a module computes what its class in ``torch.nn`` does, with the weight as it is."""
    methods = ("forward", "_conv_forward")
    replaced = any(name in vars(module) for name in methods)
    originals = {getattr(kind, name, None) for kind in SUPPORTED for name in methods}
    return not replaced and all(getattr(type(module), name, None) in originals for name in methods)


def _weights(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters of a module itself with two axes or more; None where one is computed."""
    if isinstance(module, SUPPORTED):
        # Not the attribute: to read one that is computed may change what it is computed from.
        yield "weight", module._parameters.get("weight")
        return
    for key, value in module.named_parameters(recurse=False):
        if value.ndim > 1:
            yield key, value


def _refusal(module: nn.Module, key: str, weight: Any) -> str | None:
    if isinstance(module, parametrize.ParametrizationList) or not isinstance(module, SUPPORTED):
        return f"{type(module).__name__} is no Linear, Conv, ConvTranspose or Embedding"
    if weight is None or parametrize.is_parametrized(module, key):
        return "its weight is computed from other parameters: remove the parametrization first"
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape yet: run a batch first"
    if not computes_as_its_class(module):
        return f"{type(module).__name__} computes in a way of its own"
    if hasattr(weight, "device_mesh"):
        return "its weight is sharded over processes: only whole weights can be factorized"
    if weight.dtype not in _FLOATS:
        return f"its weight is stored as {weight.dtype}"
    if weight.device.type == "meta":
        return "its weight has no values yet (meta device)"
    if weight.is_inference() or (0 in weight.stride() and weight.numel() > 1):
        return "its weight can't be changed in place (made for inference, or expanded)"
    if 0 in weight.shape:
        return f"its weight is empty (shape {tuple(weight.shape)})"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it changes its rows as it looks them up (max_norm)"
    return None


def _layer(name: str, module: nn.Module) -> Layer:
    weight = module.weight
    dtype = _DTYPES.get(weight.dtype, ir.DataType.FLOAT)
    stored = ir.Value(
        name=f"{name}.weight".lstrip("."),
        shape=ir.Shape(weight.shape),
        type=ir.TensorType(dtype),
        const_value=ir.Tensor(np.zeros(tuple(weight.shape), dtype.numpy())),
    )
    rows = ir.DataType.INT64 if isinstance(module, nn.Embedding) else dtype
    x = ir.Value(name="x", type=ir.TensorType(rows))
    inputs: list[ir.Value | None] = [x, stored]
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(module, nn.Embedding):
        node = ir.node("Gather", [stored, x], {"axis": 0}, name=name)
        shapes = {"x": (1,), "y": (1, weight.shape[1])}
    else:
        bias = None
        if module.bias is not None:
            shape = ir.Shape(module.bias.shape)
            bias = ir.Value(name=f"{name}.bias".lstrip("."), shape=shape, type=ir.TensorType(dtype))
            inputs.append(bias)
        if isinstance(module, nn.Linear):
            node = ir.node("Gemm", inputs, {"transB": 1}, name=name)
            shapes = {"x": (1, weight.shape[1]), "y": (1, weight.shape[0])}
        else:
            op = "ConvTranspose" if isinstance(module, _TRANSPOSED) else "Conv"
            node = ir.node(op, inputs, geometry(module), name=name)
    node.outputs[0].name = "y"
    others = [v for v in node.inputs if v is not None and v is not stored]
    graph = ir.Graph(
        others, node.outputs, nodes=[node], initializers=[stored], opset_imports={"": OPSET}
    )
    (layer,) = find_layers(ir.Model(graph, ir_version=9), shapes)
    return layer


def _array(weight: Tensor) -> NDArray[np.generic]:
    """A copy in float32, or in float64 where the weight is; half precision has no numpy type."""
    detached = weight.detach().cpu()
    if detached.dtype != torch.float64:
        detached = detached.float()
    return np.array(detached.numpy())
