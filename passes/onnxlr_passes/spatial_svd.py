"""spatial-svd: a convolution becomes one along its first spatial axis, then one along the rest."""

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.decompose import Form, truncated_svd
from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.convolution import ConvPass, bias_of, refuse_other_ops, slide
from onnxlr.methods.writer import Writer
from onnxlr.model.attributes import ints_attr
from onnxlr.types import Array, Rank


class SpatialSvd(ConvPass):
    """SVD of the kernel as (S·kh) × (T·kw), each group on its own."""

    name: ClassVar[str] = "spatial-svd"
    summary: ClassVar[str] = "S→T as kh×1 conv S→r, 1×kw conv r→T"
    ops: ClassVar[tuple[str, ...]] = ("Conv", "ConvTranspose")
    paper: ClassVar[str] = "Jaderberg et al. 2014, arXiv 1405.3866"

    def refuse(self, layer: Layer) -> str | None:
        """Convolutions whose kernel extends along two axes or more."""
        if (reason := refuse_other_ops(layer, self.name)) is not None:
            return reason
        kernel = kernel_of(layer)
        if len(kernel.spatial) < 2:
            return "spatial-svd needs two spatial axes, the kernel has one"
        if kernel.spatial[0] == 1 or math.prod(kernel.spatial[1:]) == 1:
            return f"spatial-svd has nothing to separate in a {kernel.extent} kernel"
        if any(ints_attr(use.node, "output_shape", ()) for use in layer.uses):
            return "spatial-svd can't tell the height in between from an output_shape"
        return None

    def full_rank(self, layer: Layer) -> Rank:
        """min(S·kh, T·kw) of a group."""
        kernel = kernel_of(layer)
        first, rest = kernel.spatial[0], math.prod(kernel.spatial[1:])
        return (min(kernel.inputs * first, kernel.outputs * rest),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The kernel of every group as (g, S/g·kh, T/g·kw)."""
        kernel = kernel_of(layer)
        group, outputs, inputs = kernel.group, kernel.outputs, kernel.inputs
        array = kernel.load(layer.array()).reshape(group, outputs, inputs, kernel.spatial[0], -1)
        return (array.transpose(0, 2, 3, 1, 4).reshape(group, inputs * kernel.spatial[0], -1),)

    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """In the order of the chain."""
        kernel, (r,) = kernel_of(layer), rank
        first = (kernel.spatial[0], *(1,) * (len(kernel.spatial) - 1))
        rest = (1, *kernel.spatial[1:])
        return (
            Kernel(kernel.group, r, kernel.inputs, first, kernel.transposed),
            Kernel(kernel.group, kernel.outputs, r, rest, kernel.transposed),
        )

    def form(self, layer: Layer, rank: Rank) -> Form:
        """The product over the bottleneck."""
        return Form("rsa,trb->tsab")

    def views(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """Of one group."""
        kernel, (r,) = kernel_of(layer), rank
        rest = math.prod(kernel.spatial[1:])
        return (r, kernel.inputs, kernel.spatial[0]), (kernel.outputs, r, rest)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The conv along the first axis Uᵀ, then the conv along the rest Uᵀ·W."""
        u, v = truncated_svd(self.unfoldings(layer)[0], rank[0])
        vertical, horizontal = self.kernels(layer, rank)
        v = v.reshape(horizontal.group, rank[0], horizontal.outputs, horizontal.positions)
        return vertical.store(u.transpose(0, 2, 1)), horizontal.store(v.transpose(0, 2, 1, 3))

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Each node strides, pads and dilates along its own axes; the bias is on the second."""
        vertical, horizontal = self.kernels(layer, rank)
        rest = range(1, len(horizontal.spatial))
        hidden = slide(writer, use, use.x, factors[0], vertical, axes=(0,))
        return slide(writer, use, hidden, factors[1], horizontal, axes=rest, bias=bias_of(use))
