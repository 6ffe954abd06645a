"""What every convolution pass needs: Conv and ConvTranspose seen alike, whole or axis by axis."""

import math
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.decompose import Form, truncated_svd
from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.base import ChainPass
from onnxlr.methods.letters import Letters
from onnxlr.methods.writer import AttributeValue, Writer, integers
from onnxlr.model.attributes import auto_pad, ints_attr
from onnxlr.types import Array, Rank, Shape

T = TypeVar("T", bound=np.generic)


class ConvPass(ChainPass):
    """A pass whose factors are kernels, multiplied as an einsum says, in each group alone.

    The result of the equation is outputs, inputs, and letters of spatial axes: one axis each, the
    last all that are left. A letter that isn't in the result joins factors: it is a component of
    the rank. A factor's letters are the outputs, inputs and axes of its kernel; one with a single
    channel letter is a depthwise kernel. Kernels, unfoldings, ranks and nodes follow from that; so
    do the factors, by truncated SVD, where there are two.
    """

    ops: ClassVar[tuple[str, ...]] = ("Conv", "ConvTranspose")
    # For example "rsp,tr->tsp": in the order of the chain.
    equation: ClassVar[str]

    def refuse(self, layer: Layer) -> str | None:
        """Whatever is no convolution; any number of dimensions and groups will do."""
        return refuse_other_ops(layer, self.name)

    def form(self, layer: Layer) -> Form:
        """How one group's lowered kernel, outputs × (inputs · positions), is made of factors."""
        return Form(self.equation)

    def full_rank(self, layer: Layer) -> Rank:
        """The smaller side of each unfolding."""
        letters = self._letters(layer)
        return tuple(
            min(math.prod(letters.shape(side)) for side in sides) for sides in letters.sides
        )

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The kernel of every group as rows × columns, (g, m, n), for each component of the rank.

        The rows are what the smallest factor with that component has besides.
        """
        letters, result = self._letters(layer), self.form(layer).result
        kernel = letters.kernel
        whole = kernel.load(layer.array()).reshape(kernel.group, *letters.shape(result))
        return tuple(
            _permuted(whole, result, rows + columns).reshape(
                kernel.group, math.prod(letters.shape(rows)), -1
            )
            for rows, columns in letters.sides
        )

    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """The kernels of the chain, in order."""
        letters = self._letters(layer)
        return tuple(letters.kernel_of(term, rank) for term in letters.form.terms)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """Those of the kernels as they are stored."""
        return tuple(kernel.stored_shape for kernel in self.kernels(layer, rank))

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD U·V of the unfolding, for two factors: the smaller one is U."""
        letters = self._letters(layer)
        ((rows, columns),), join = letters.sides, letters.joins
        u, v = truncated_svd(self.unfoldings(layer)[0], rank[0])
        parts = []
        for term in letters.form.terms:
            part, order = (u, rows + join) if set(term) == {*rows, join} else (v, join + columns)
            part = part.reshape(layer.group, *letters.shape(order, rank))
            parts.append(_permuted(part, order, term))
        return self.store(layer, rank, parts)

    def store(self, layer: Layer, rank: Rank, parts: Sequence[Array]) -> tuple[Array, ...]:
        """Factors of all groups, (g, letters of the form…), in the layout that operators store."""
        kernels = self.kernels(layer, rank)
        return tuple(kernel.store(part) for kernel, part in zip(kernels, parts, strict=True))

    def unpack(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> list[list[Array]]:
        """Each kernel cut by groups, with an axis for each letter of the form."""
        letters = self._letters(layer)
        terms = zip(letters.form.terms, self.kernels(layer, rank), factors, strict=True)
        parts = [
            kernel.load(factor).reshape(layer.group, *letters.shape(term, rank))
            for term, kernel, factor in terms
        ]
        return [list(group) for group in zip(*parts, strict=True)]

    def pack(self, layer: Layer, rank: Rank, groups: list[list[Array]]) -> tuple[Array, ...]:
        """The groups side by side, in the layout that operators store."""
        return self.store(layer, rank, [np.stack(parts) for parts in zip(*groups, strict=True)])

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """The kernel that the form makes of the factors."""
        form = self.form(layer)
        groups = [form.compose(group) for group in self.unpack(layer, rank, factors)]
        return kernel_of(layer).store(np.stack(groups))

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """A conv for each factor: it slides as the original does, along the axes that it has.

        One without axes is a 1×1 Conv. The bias is on the last.
        """
        letters, x = self._letters(layer), use.x
        chain = zip(letters.form.terms, self.kernels(layer, rank), factors, strict=True)
        for term, kernel, factor in chain:
            bias = bias_of(use) if factor is factors[-1] else ()
            if letters.slides(term):
                x = slide(writer, use, x, factor, kernel, letters.axes(term), bias)
            else:
                x = pointwise(writer, x, factor, kernel, bias)
        return x

    def _letters(self, layer: Layer) -> Letters:
        return Letters(self.form(layer), kernel_of(layer))


def _permuted(array: NDArray[T], letters: str, order: str) -> NDArray[T]:
    """An array (g, letters…) with its axes in another order."""
    return array.transpose(0, *(1 + letters.index(letter) for letter in order))


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

    By index, so that the other axes may have any size, zero too.
    """
    order = np.arange(math.prod(channels)).reshape(channels).swapaxes(1, 2)
    return writer.op("Gather", [x, integers(writer, *order.ravel().tolist())], {"axis": 1})


def bias_of(use: Use) -> list[ir.Value | None]:
    """The original's bias input, if it has one, for the last node of a chain."""
    return list(use.node.inputs[2:])
