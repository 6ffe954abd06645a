"""What a pass writes in a layer's place, as modules of PyTorch that train and export."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onnxlr.errors import ModelError, UsageError
from onnxlr.layers.layer import Use
from onnxlr.methods.choice import Choice
from onnxlr.methods.writer import AttributeValue, Write
from onnxlr.training.factors import Dims, convolution, embedding, linear
from onnxlr.training.modules import OPSET, ModuleLayer, padding
from onnxlr.types import Array

_PADS = {"reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}


def chain_module(item: ModuleLayer, choice: Choice, factors: Sequence[Array]) -> nn.Module:
    """The chain of a pass around factors, ready to train in the module's place.

    It is made of the nodes that the pass writes into a graph: a ``Sequential`` of convolutions,
    linear or embedding modules, or ``Steps`` where it is no straight line. Its bias is the very
    parameter of the module.

    Parameters
    ----------
    item : ModuleLayer
    choice : Choice
        Its method writes a chain: it is none that multiplies its factors back at load.
    factors : sequence of ndarray
        As they are stored.

    Raises
    ------
    UsageError
        If the pass writes an operator that has no module here.
    """
    module = item.module
    site = _ModuleSite(choice.graph_pass.name, module, factors)
    choice.graph_pass.install(item.layer, choice.rank, site)
    steps = site.steps
    if getattr(module, "padding_mode", "zeros") != "zeros":
        before, after = padding(module)
        both = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
        kind = f"{_PADS[module.padding_mode]}Pad{len(before)}d"
        steps = [(getattr(nn, kind)(tuple(both)), (0,)), *((s, _later(i)) for s, i in steps)]
    # What counts axes from the first has to know whether there is a batch.
    straight = all(
        inputs == (i,) and not isinstance(step, Picked) for i, (step, inputs) in enumerate(steps)
    )
    axes = len(module.kernel_size) + 2 if item.layer.convolves else None
    chain = nn.Sequential(*(s for s, _ in steps)) if straight else Steps(steps, axes)
    return chain.train(module.training)


class Steps(nn.Module):
    """Operators that take results of earlier ones: the input is result 0, the last is returned.

    Parameters
    ----------
    steps : sequence of (torch.nn.Module, tuple of int)
        Operators, each with the numbers of the results that it takes.
    axes : int, optional
        How many a batch of images has, where one image may come without its batch.
    """

    def __init__(self, steps: Sequence[tuple[nn.Module, Dims]], axes: int | None = None) -> None:
        super().__init__()
        self._axes = axes
        self.steps = nn.ModuleList(step for step, _ in steps)
        self._inputs = tuple(inputs for _, inputs in steps)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output of its input."""
        if self._axes is not None and x.ndim == self._axes - 1:
            return self(x[None])[0]
        results = [x]
        for step, inputs in zip(self.steps, self._inputs, strict=True):
            results.append(step(*(results[i] for i in inputs)))
        return results[-1]


class Product(nn.Module):
    """A product with a stack of matrices."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x·W, batched over leading axes."""
        return x @ self.weight


class Shift(nn.Module):
    """A bias by itself."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """X + b."""
        return x + self.bias


class ShapeOf(nn.Module):
    """The sizes of a tensor, or a slice of them."""

    def forward(self, x: Tensor) -> Dims:
        """The sizes, from the first axis on."""
        return tuple(x.shape)


class Part(nn.Module):
    """Some of a tensor's sizes."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, dims: Dims) -> Dims:
        """The sizes from ``start`` to ``end``."""
        return dims[self.start : self.end]


class Joined(nn.Module):
    """Fixed sizes and sizes that are read off tensors, in a row."""

    def __init__(self, parts: Sequence[Dims | None]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    def forward(self, *dims: Dims) -> Dims:
        """The fixed ones with those of the tensors in between."""
        read = iter(dims)
        return tuple(d for part in self.parts for d in (next(read) if part is None else part))


class Reshaped(nn.Module):
    """ONNX's Reshape: 0 stands for the size that the data has there, unless it is meant."""

    def __init__(self, dims: Dims | None, *, meant: bool) -> None:
        super().__init__()
        self.dims, self.meant = dims, meant

    def forward(self, x: Tensor, dims: Dims = ()) -> Tensor:
        """The same elements in another shape."""
        sizes = dims if self.dims is None else self.dims
        if self.meant:
            return x.reshape(sizes)
        return x.reshape([d if d != 0 else x.shape[i] for i, d in enumerate(sizes)])


class Picked(nn.Module):
    """Entries along an axis, by index."""

    indices: Tensor

    def __init__(self, indices: Dims, axis: int) -> None:
        super().__init__()
        self.register_buffer("indices", torch.tensor(indices), persistent=False)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """The entries in the order of the indices."""
        return x.index_select(self.axis, self.indices)


class Permuted(nn.Module):
    """Axes in another order."""

    def __init__(self, perm: Dims) -> None:
        super().__init__()
        self.perm = perm

    def forward(self, x: Tensor) -> Tensor:
        """The permuted view."""
        return x.permute(self.perm)


class _ModuleSite:
    """A module's place, which the steps of a chain take (the ``Site`` of a pass)."""

    def __init__(self, method: str, module: nn.Module, factors: Sequence[Array]) -> None:
        self.steps: list[tuple[nn.Module, Dims]] = []
        self._method, self._module, self._factors = method, module, factors

    def replace_use(self, use: Use, write: Write) -> None:
        """Make the steps; a module has one user."""
        module = self._module
        writer = _ModuleWriter(use.x, self._method, module)
        stored = tuple(writer.parameter(f, module.weight) for f in self._factors)
        if getattr(module, "bias", None) is not None:
            bias = use.node.inputs[2]
            assert bias is not None
            writer.parameters[bias] = module.bias
        write(stored, writer)
        self.steps = writer.steps

    def replace_input(self, use: Use, write: Write) -> None:
        """Refuse: modules with such operators aren't selected."""
        raise UsageError(f"{self._method} has no modules: train them with DeepTwist")

    def replace_weight(self, write: Write) -> None:
        """Refuse: there is no chain to train."""
        raise UsageError(
            f"{self._method} leaves the weight whole where it is used: train it with DeepTwist"
        )


class _ModuleWriter:
    """Makes a module of every node (the ``Writer`` of a pass)."""

    opset = OPSET

    def __init__(self, x: ir.Value, method: str, origin: nn.Module) -> None:
        self.parameters: dict[ir.Value, nn.Parameter] = {}
        self.steps: list[tuple[nn.Module, Dims]] = []
        self._method, self._origin = method, origin
        self._numbers: dict[ir.Value, Dims] = {}
        self._results = {x: 0}

    def parameter(self, array: Array, like: nn.Parameter) -> ir.Value:
        """A factor that trains, of the type and on the device of the weight."""
        data = torch.from_numpy(np.ascontiguousarray(array)).to(like.detach())
        if not data.isfinite().all():
            raise ModelError(f"a factor is beyond what {like.dtype} holds: train in a wider type")
        value = ir.Value(shape=ir.Shape(array.shape))
        self.parameters[value] = nn.Parameter(data, requires_grad=like.requires_grad)
        return value

    def op(
        self, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, AttributeValue]
    ) -> ir.Value:
        """Add a module and return its output."""
        operands = [v for v in inputs if v is not None]
        module = self._module(op_type, operands, attributes)
        sources = tuple(self._results[v] for v in operands if v in self._results)
        self.steps.append((module, sources))
        output = ir.Value()
        self._results[output] = len(self.steps)
        return output

    def constant(self, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        """Add sizes, axes or bounds."""
        value = ir.Value(shape=ir.Shape(array.shape))
        self._numbers[value] = tuple(int(n) for n in array.reshape(-1))
        return value

    def _module(
        self, op_type: str, operands: list[ir.Value], attributes: Mapping[str, AttributeValue]
    ) -> nn.Module:
        weights = [self.parameters[v] for v in operands if v in self.parameters]
        numbers = [self._numbers[v] for v in operands if v in self._numbers]
        match op_type:
            case "Conv" | "ConvTranspose":
                return convolution(op_type, attributes, *weights)
            case "Gemm" if attributes.get("transB") == 1:
                return linear(*weights)
            case "MatMul" if operands[1] in self.parameters:
                (weight,) = weights
                if weight.ndim > 2:
                    return Product(weight)
                return linear(nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad))
            case "Gather" if operands[0] in self.parameters:
                return embedding(weights[0], self._origin)
            case "Add" if len(weights) == 1:
                return Shift(weights[0])
            case "Shape":
                return ShapeOf()
            case "Slice":
                return Part(numbers[0][0], numbers[1][0])
            case "Concat":
                return Joined([self._numbers.get(v) for v in operands])
            case "Reshape":
                return Reshaped(
                    numbers[0] if numbers else None, meant=attributes.get("allowzero") == 1
                )
            case "Gather" if numbers and isinstance(axis := attributes["axis"], int):
                return Picked(numbers[0], axis)
            case "Transpose":
                perm = attributes["perm"]
                assert isinstance(perm, tuple)
                return Permuted(perm)
        raise UsageError(
            f"{self._method} writes {op_type}, which has no module here: train the whole weight "
            "with DeepTwist, and factorize the exported model"
        )


def _later(inputs: Dims) -> Dims:
    """The numbers of the same results after a step was put before the first."""
    return tuple(i + 1 for i in inputs)
