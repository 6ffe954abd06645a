"""channel-svd: a Conv becomes the same Conv with r outputs, then a 1×1 Conv to all outputs."""

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.convolution import kernel_axes, pointwise_attributes, sliding_attributes, sum_macs
from onnxlr.decompose import truncated_svd
from onnxlr.graph_pass import Array, GraphPass, Rank, Writer
from onnxlr.layers import Layer, Use


class ChannelSvd(GraphPass):
    """SVD of the lowered kernel T × (S·kh·kw), each group on its own."""

    name: ClassVar[str] = "channel-svd"
    summary: ClassVar[str] = "Conv S→T as k×k conv S→r, 1×1 conv r→T"
    ops: ClassVar[tuple[str, ...]] = ("Conv",)
    paper: ClassVar[str] = "Zhang et al. 2015, arXiv 1505.06798"

    def refuse(self, layer: Layer) -> str | None:
        """Any Conv, in any number of dimensions and groups."""
        return None if layer.kind == "conv" else f"channel-svd replaces Conv, not {layer.op}"

    def unfolding_shapes(self, layer: Layer) -> tuple[tuple[int, int, int], ...]:
        """One stack (g, T/g, S/g·kh·kw)."""
        group, outputs, inputs, spatial = kernel_axes(layer)
        return ((group, outputs, inputs * math.prod(spatial)),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The lowered kernel of every group."""
        return (layer.array().reshape(self.unfolding_shapes(layer)[0]),)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """(g·r, S/g, kh, kw) and (T, r, 1, 1)."""
        group, outputs, inputs, spatial = kernel_axes(layer)
        ones = (1,) * len(spatial)
        return (group * rank[0], inputs, *spatial), (group * outputs, rank[0], *ones)

    def macs(self, layer: Layer, rank: Rank) -> int | None:
        """Both convs run at the output's positions."""
        params = self.params(layer, rank)
        return sum_macs(layer, lambda _, after: after * params)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The sliding conv Uᵀ·W, then the 1×1 conv U."""
        u, v = truncated_svd(self.unfoldings(layer)[0], rank[0])
        first, second = self.factor_shapes(layer, rank)
        return v.reshape(first), u.reshape(second)

    def write(
        self, layer: Layer, use: Use, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The original's strides, pads and dilations on the first conv, its bias on the second."""
        sliding, pointwise = factors
        hidden = writer.op("Conv", [use.x, sliding], sliding_attributes(layer, use, layer.group))
        bias = list(use.node.inputs[2:])
        return writer.op(
            "Conv", [hidden, pointwise, *bias], pointwise_attributes(layer, layer.group)
        )
