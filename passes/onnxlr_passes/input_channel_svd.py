"""input-channel-svd: a convolution becomes a 1×1 Conv to r inputs, then the same one on those."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.decompose import Form, truncated_svd
from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.convolution import ConvPass, bias_of, pointwise, refuse_other_ops, slide
from onnxlr.methods.writer import Writer
from onnxlr.types import Array, Rank


class InputChannelSvd(ConvPass):
    """SVD of the kernel as S × (T·kh·kw), each group on its own."""

    name: ClassVar[str] = "input-channel-svd"
    summary: ClassVar[str] = "S→T as 1×1 conv S→r, k×k conv r→T"
    ops: ClassVar[tuple[str, ...]] = ("Conv", "ConvTranspose")
    paper: ClassVar[str] = "Li & Shi 2018, ECCV (constrained network decomposition)"

    def refuse(self, layer: Layer) -> str | None:
        """Any convolution, in any number of dimensions and groups."""
        return refuse_other_ops(layer, self.name)

    def full_rank(self, layer: Layer) -> Rank:
        """min(S, T·kh·kw) of a group."""
        kernel = kernel_of(layer)
        return (min(kernel.inputs, kernel.outputs * kernel.positions),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The kernel of every group with its input channels as rows, (g, S/g, T/g·kh·kw)."""
        kernel = kernel_of(layer)
        array = kernel.load(layer.array()).transpose(0, 2, 1, 3)
        return (array.reshape(kernel.group, kernel.inputs, -1),)

    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """In the order of the chain."""
        kernel, (r,) = kernel_of(layer), rank
        ones = (1,) * len(kernel.spatial)
        return (
            Kernel(kernel.group, r, kernel.inputs, ones),
            Kernel(kernel.group, kernel.outputs, r, kernel.spatial, kernel.transposed),
        )

    def form(self, layer: Layer, rank: Rank) -> Form:
        """The product over the bottleneck."""
        return Form("rs,trp->tsp")

    def views(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """Of one group."""
        kernel, (r,) = kernel_of(layer), rank
        return (r, kernel.inputs), (kernel.outputs, r, kernel.positions)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The 1×1 conv Uᵀ, then the sliding conv Uᵀ·W."""
        u, v = truncated_svd(self.unfoldings(layer)[0], rank[0])
        mixing, sliding = self.kernels(layer, rank)
        shape = (sliding.group, rank[0], sliding.outputs, sliding.positions)
        return mixing.store(u.transpose(0, 2, 1)), sliding.store(
            v.reshape(shape).transpose(0, 2, 1, 3)
        )

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The original's strides, pads, dilations and bias on the second node.

        The first has no bias, so that zero padding of its output is padding of its input. A Conv
        with a 1×1 kernel strides and pads in the first node, which then computes no more than
        needed.
        """
        mixing, sliding = self.kernels(layer, rank)
        if sliding.positions == 1 and not sliding.transposed:
            hidden = slide(writer, use, use.x, factors[0], mixing)
            return pointwise(writer, hidden, factors[1], sliding, bias_of(use))
        hidden = pointwise(writer, use.x, factors[0], mixing)
        return slide(writer, use, hidden, factors[1], sliding, bias=bias_of(use))
