"""What every convolution pass needs: Conv and ConvTranspose seen alike, whole or axis by axis."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxlr.decompose import Form
from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.base import ChainPass
from onnxlr.methods.writer import AttributeValue, Writer, integers
from onnxlr.model.attributes import auto_pad, ints_attr
from onnxlr.types import Array, Rank, Shape


class ConvPass(ChainPass):
    """A pass whose factors are kernels, multiplied as a form says, each group on its own."""

    @abstractmethod
    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """The kernels of the chain, in order."""

    @abstractmethod
    def form(self, layer: Layer, rank: Rank) -> Form:
        """How one group's lowered kernel, outputs × (inputs · positions), is made of factors."""

    @abstractmethod
    def views(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """Shapes of one group's factors, in the order of the form's letters."""

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """Those of the kernels as they are stored."""
        return tuple(kernel.stored for kernel in self.kernels(layer, rank))

    def unpack(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> list[list[Array]]:
        """Each kernel as (outputs, inputs, positions), cut by groups and seen as the form does."""
        parts = [
            kernel.load(factor).reshape(layer.group, *view)
            for kernel, factor, view in zip(
                self.kernels(layer, rank), factors, self.views(layer, rank), strict=True
            )
        ]
        return [list(group) for group in zip(*parts, strict=True)]

    def pack(self, layer: Layer, rank: Rank, groups: list[list[Array]]) -> tuple[Array, ...]:
        """The groups side by side, in the layout that each operator stores."""
        parts = (np.stack(factors) for factors in zip(*groups, strict=True))
        kernels = self.kernels(layer, rank)
        return tuple(kernel.store(part) for kernel, part in zip(kernels, parts, strict=True))

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """The kernel that the form makes of the factors."""
        form = self.form(layer, rank)
        groups = [form.compose(group) for group in self.unpack(layer, rank, factors)]
        return kernel_of(layer).store(np.stack(groups))


def refuse_other_ops(layer: Layer, name: str) -> str | None:
    """A reason for every layer that is no convolution."""
    if layer.convolves:
        return None
    return f"{name} replaces Conv and ConvTranspose, not {layer.op}"


def slide(
    writer: Writer,
    use: Use,
    x: ir.Value,
    weight: ir.Value,
    kernel: Kernel,
    axes: Sequence[int] | None = None,
    bias: Sequence[ir.Value | None] = (),
) -> ir.Value:
    """Write a conv that slides as the original does along some spatial axes, all by default.

    Along the others it has stride 1, no dilation and no padding. The operator is the original's.
    """
    node, count = use.node, len(kernel.spatial)
    sliding = set(range(count) if axes is None else axes)

    def along(values: Shape, still: int) -> Shape:
        return tuple(v if i % count in sliding else still for i, v in enumerate(values))

    ones = (1,) * count
    attributes: dict[str, AttributeValue] = {
        "kernel_shape": kernel.spatial,
        "strides": along(ints_attr(node, "strides", ones), 1),
        "dilations": along(ints_attr(node, "dilations", ones), 1),
        "group": kernel.group,
    }
    mode = auto_pad(node)
    if mode == "NOTSET":
        attributes["pads"] = along(ints_attr(node, "pads", (0,) * (2 * count)), 0)
    else:
        attributes["auto_pad"] = mode
    if kernel.transposed:
        if extra := ints_attr(node, "output_padding", ()):
            attributes["output_padding"] = along(extra, 0)
        if size := ints_attr(node, "output_shape", ()):
            attributes["output_shape"] = size
    op = "ConvTranspose" if kernel.transposed else "Conv"
    return writer.op(op, [x, weight, *bias], attributes)


def pointwise(
    writer: Writer,
    x: ir.Value,
    weight: ir.Value,
    kernel: Kernel,
    bias: Sequence[ir.Value | None] = (),
) -> ir.Value:
    """Write a 1×…×1 Conv that touches every position once."""
    attributes: dict[str, AttributeValue] = {
        "kernel_shape": kernel.spatial,
        "group": kernel.group,
    }
    return writer.op("Conv", [x, weight, *bias], attributes)


def swap_groups(writer: Writer, x: ir.Value, channels: tuple[int, int, int, int]) -> ir.Value:
    """Write a channel shuffle: from the order (group, outer, inner, each) to (…, inner, outer, …).

    By name, so that nothing need be known of the other axes, which may be empty.
    """
    order = np.arange(math.prod(channels)).reshape(channels).swapaxes(1, 2)
    return writer.op("Gather", [x, integers(writer, *order.ravel().tolist())], {"axis": 1})


def bias_of(use: Use) -> list[ir.Value | None]:
    """The original's bias input, if it has one, for the last node of a chain."""
    return list(use.node.inputs[2:])
