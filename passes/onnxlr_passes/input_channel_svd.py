"""input-channel-svd: a Conv becomes a 1×1 Conv to r inputs, then the same Conv on those."""

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.convolution import kernel_axes, pointwise_attributes, sliding_attributes, sum_macs
from onnxlr.decompose import truncated_svd
from onnxlr.graph_pass import Array, GraphPass, Rank, Writer
from onnxlr.layers import Layer, Use


class InputChannelSvd(GraphPass):
    """SVD of the kernel as S × (T·kh·kw), each group on its own."""

    name: ClassVar[str] = "input-channel-svd"
    summary: ClassVar[str] = "Conv S→T as 1×1 conv S→r, k×k conv r→T"
    ops: ClassVar[tuple[str, ...]] = ("Conv",)
    paper: ClassVar[str] = "Li & Shi 2018, ECCV (constrained network decomposition)"

    def refuse(self, layer: Layer) -> str | None:
        """Any Conv, in any number of dimensions and groups."""
        return None if layer.kind == "conv" else f"input-channel-svd replaces Conv, not {layer.op}"

    def unfolding_shapes(self, layer: Layer) -> tuple[tuple[int, int, int], ...]:
        """One stack (g, S/g, T/g·kh·kw)."""
        group, outputs, inputs, spatial = kernel_axes(layer)
        return ((group, inputs, outputs * math.prod(spatial)),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The kernel of every group, its input channels as rows."""
        group, outputs, inputs, spatial = kernel_axes(layer)
        kernel = layer.array().reshape(group, outputs, inputs, math.prod(spatial))
        return (kernel.transpose(0, 2, 1, 3).reshape(self.unfolding_shapes(layer)[0]),)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """(g·r, S/g, 1, 1) and (T, r, kh, kw)."""
        group, outputs, inputs, spatial = kernel_axes(layer)
        ones = (1,) * len(spatial)
        return (group * rank[0], inputs, *ones), (group * outputs, rank[0], *spatial)

    def macs(self, layer: Layer, rank: Rank) -> int | None:
        """The 1×1 conv runs at the input's positions, unless it can take the stride itself."""
        shapes = self.factor_shapes(layer, rank)
        pointwise, sliding = (math.prod(shape) for shape in shapes)
        if _is_pointwise(layer):
            return sum_macs(layer, lambda _, after: after * (pointwise + sliding))
        return sum_macs(layer, lambda before, after: before * pointwise + after * sliding)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The 1×1 conv Uᵀ, then the sliding conv Uᵀ·W."""
        group, outputs, _, spatial = kernel_axes(layer)
        u, v = truncated_svd(self.unfoldings(layer)[0], rank[0])
        first, second = self.factor_shapes(layer, rank)
        v = v.reshape(group, rank[0], outputs, math.prod(spatial))
        return u.transpose(0, 2, 1).reshape(first), v.transpose(0, 2, 1, 3).reshape(second)

    def write(
        self, layer: Layer, use: Use, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The original's strides, pads, dilations and bias on the second conv.

        The first conv has no bias, so that zero padding of its output is padding of its input.
        A 1×1 kernel strides and pads in the first conv, which then computes no more than needed.
        """
        pointwise, sliding = factors
        slide = sliding_attributes(layer, use, layer.group)
        stay = pointwise_attributes(layer, layer.group)
        first, second = (slide, stay) if _is_pointwise(layer) else (stay, slide)
        hidden = writer.op("Conv", [use.x, pointwise], first)
        return writer.op("Conv", [hidden, sliding, *use.node.inputs[2:]], second)


def _is_pointwise(layer: Layer) -> bool:
    return math.prod(layer.shape[2:]) == 1
