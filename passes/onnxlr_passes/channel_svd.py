"""channel-svd: a convolution becomes the same one with r outputs, then a 1×1 Conv to them all."""

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


class ChannelSvd(ConvPass):
    """SVD of the lowered kernel T × (S·kh·kw), each group on its own."""

    name: ClassVar[str] = "channel-svd"
    summary: ClassVar[str] = "S→T as k×k conv S→r, 1×1 conv r→T"
    ops: ClassVar[tuple[str, ...]] = ("Conv", "ConvTranspose")
    paper: ClassVar[str] = "Zhang et al. 2015, arXiv 1505.06798"

    def refuse(self, layer: Layer) -> str | None:
        """Any convolution, in any number of dimensions and groups."""
        return refuse_other_ops(layer, self.name)

    def full_rank(self, layer: Layer) -> Rank:
        """min(T, S·kh·kw) of a group."""
        kernel = kernel_of(layer)
        return (min(kernel.outputs, kernel.inputs * kernel.positions),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The lowered kernel of every group, (g, T/g, S/g·kh·kw)."""
        kernel = kernel_of(layer)
        return (kernel.load(layer.array()).reshape(kernel.group, kernel.outputs, -1),)

    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """In the order of the chain."""
        kernel, (r,) = kernel_of(layer), rank
        ones = (1,) * len(kernel.spatial)
        return (
            Kernel(kernel.group, r, kernel.inputs, kernel.spatial, kernel.transposed),
            Kernel(kernel.group, kernel.outputs, r, ones),
        )

    def form(self, layer: Layer, rank: Rank) -> Form:
        """The product over the bottleneck."""
        return Form("rsp,tr->tsp")

    def views(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """Of one group."""
        kernel, (r,) = kernel_of(layer), rank
        return (r, kernel.inputs, kernel.positions), (kernel.outputs, r)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The sliding conv Uᵀ·W, then the 1×1 conv U."""
        u, v = truncated_svd(self.unfoldings(layer)[0], rank[0])
        sliding, mixing = self.kernels(layer, rank)
        return sliding.store(v), mixing.store(u)

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The original's strides, pads and dilations on the first node, its bias on the second."""
        sliding, mixing = self.kernels(layer, rank)
        hidden = slide(writer, use, use.x, factors[0], sliding)
        return pointwise(writer, hidden, factors[1], mixing, bias_of(use))
