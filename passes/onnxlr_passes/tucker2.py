"""tucker2: a convolution becomes 1×1 to fewer inputs, a small core, and 1×1 to all outputs."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.decompose import Form, tucker2
from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.convolution import ConvPass, bias_of, pointwise, refuse_other_ops, slide
from onnxlr.methods.writer import Writer
from onnxlr.types import Array, Rank


class Tucker2(ConvPass):
    """Tucker decomposition along the channels, ranks (r_s, r_t), each group on its own."""

    name: ClassVar[str] = "tucker2"
    summary: ClassVar[str] = "S→T as 1×1 conv S→r_s, k×k conv r_s→r_t, 1×1 conv r_t→T"
    ops: ClassVar[tuple[str, ...]] = ("Conv", "ConvTranspose")
    numbers: ClassVar[tuple[int, ...]] = (1, 2)
    paper: ClassVar[str] = "Kim et al. 2015, arXiv 1511.06530"

    def refuse(self, layer: Layer) -> str | None:
        """Any convolution, in any number of dimensions and groups."""
        return refuse_other_ops(layer, self.name)

    def full_rank(self, layer: Layer) -> Rank:
        """All input and all output channels of a group, or as many as the other side spans."""
        kernel = kernel_of(layer)
        inputs, outputs, positions = kernel.inputs, kernel.outputs, kernel.positions
        return min(inputs, outputs * positions), min(outputs, inputs * positions)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The mode-S and the mode-T unfolding of every group."""
        kernel = kernel_of(layer)
        array = kernel.load(layer.array())
        inputs = array.transpose(0, 2, 1, 3).reshape(kernel.group, kernel.inputs, -1)
        return inputs, array.reshape(kernel.group, kernel.outputs, -1)

    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """In the order of the chain."""
        kernel = kernel_of(layer)
        ones = (1,) * len(kernel.spatial)
        r_s, r_t = rank
        return (
            Kernel(kernel.group, r_s, kernel.inputs, ones),
            Kernel(kernel.group, r_t, r_s, kernel.spatial, kernel.transposed),
            Kernel(kernel.group, kernel.outputs, r_t, ones),
        )

    def form(self, layer: Layer, rank: Rank) -> Form:
        """The product over the bottleneck."""
        return Form("xs,yxp,ty->tsp")

    def views(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """Of one group."""
        kernel, (r_s, r_t) = kernel_of(layer), rank
        core = (r_t, r_s, kernel.positions)
        return (r_s, kernel.inputs), core, (kernel.outputs, r_t)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Higher-order orthogonal iteration from the truncated higher-order SVD."""
        kernels = kernel_of(layer).load(layer.array())
        return self._stored(layer, rank, *tucker2(kernels, (rank[0], rank[1])))

    def sketch(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The truncated higher-order SVD."""
        kernels = kernel_of(layer).load(layer.array())
        return self._stored(layer, rank, *tucker2(kernels, (rank[0], rank[1]), sweeps=0))

    def follow(
        self, layers: Sequence[Layer], rank: Rank, factors: Sequence[tuple[Array, ...]]
    ) -> list[tuple[Array, ...]]:
        """Higher-order orthogonal iteration of all at once, from the outputs' factors."""
        kernels = np.concatenate([kernel_of(item).load(item.array()) for item in layers])
        starts = [
            u
            for item, near in zip(layers, factors, strict=True)
            for _, _, u in self.unpack(item, rank, near)
        ]
        found = tucker2(kernels, (rank[0], rank[1]), start=np.stack(starts))
        parts = [np.split(part, len(layers)) for part in found]
        return [
            self._stored(item, rank, *own)
            for item, own in zip(layers, zip(*parts, strict=True), strict=True)
        ]

    def _stored(
        self, layer: Layer, rank: Rank, v: Array, core: Array, u: Array
    ) -> tuple[Array, ...]:
        first, middle, last = self.kernels(layer, rank)
        return first.store(v.transpose(0, 2, 1)), middle.store(core), last.store(u)

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The core slides as the original did; the bias is on the last node."""
        first, core, last = self.kernels(layer, rank)
        hidden = pointwise(writer, use.x, factors[0], first)
        hidden = slide(writer, use, hidden, factors[1], core)
        return pointwise(writer, hidden, factors[2], last, bias_of(use))
