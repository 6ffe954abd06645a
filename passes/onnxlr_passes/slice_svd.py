"""slice-svd: every 2-D slice of a kernel becomes a sum of r columns times rows, in two convs."""

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.methods import (
    Array,
    ConvPass,
    Kernel,
    Layer,
    Rank,
    Use,
    Writer,
    bias_of,
    kernel_of,
    slide,
    swap_groups,
    truncated_svd,
)


class SliceSvd(ConvPass):
    """K[t, s] ≈ Σ_r u·vᵀ for each output t and input s by themselves.

    It shares nothing between slices, so that it saves only where kernels are large, and its two
    grouped convs are often slower than the one they replace.
    """

    name: ClassVar[str] = "slice-svd"
    summary: ClassVar[str] = "S→T as kh×1 grouped conv S→S·T·r, 1×kw grouped conv to T"
    ops: ClassVar[tuple[str, ...]] = ("Conv",)
    paper: ClassVar[str] = "Rigamonti et al. 2013"
    # Columns belong to their input channel, rows to their output channel.
    equation: ClassVar[str] = "stra,tsrb->tsab"

    def refuse(self, layer: Layer) -> str | None:
        """Conv whose kernel extends along two axes or more."""
        if layer.kind != "conv":
            return super().refuse(layer) or f"{self.name} replaces Conv alone"
        kernel = kernel_of(layer)
        if len(kernel.spatial) < 2 or kernel.spatial[0] == 1 or math.prod(kernel.spatial[1:]) == 1:
            return f"slice-svd has nothing to separate in a {kernel.extent} kernel"
        return None

    def full_rank(self, layer: Layer) -> Rank:
        """min(kh, kw)."""
        spatial = kernel_of(layer).spatial
        return (min(spatial[0], math.prod(spatial[1:])),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """All slices, (g·T/g·S/g, kh, kw)."""
        kernel = kernel_of(layer)
        rest = math.prod(kernel.spatial[1:])
        return (kernel.load(layer.array()).reshape(-1, kernel.spatial[0], rest),)

    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """Columns (S·T/g·r, 1, kh, 1) and rows (T, S/g·r, 1, kw)."""
        kernel, (r,) = kernel_of(layer), rank
        first = (kernel.spatial[0], *(1,) * (len(kernel.spatial) - 1))
        channels = kernel.group * kernel.inputs
        return (
            Kernel(channels, kernel.outputs * r, 1, first),
            Kernel(kernel.group * kernel.outputs, 1, kernel.inputs * r, (1, *kernel.spatial[1:])),
        )

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD of every slice."""
        kernel, (r,) = kernel_of(layer), rank
        u, v = truncated_svd(self.unfoldings(layer)[0], r)
        shape = (kernel.group, kernel.outputs, kernel.inputs)
        u = u.reshape(*shape, -1, r).transpose(0, 2, 1, 4, 3)
        return self.store(layer, rank, [u, v.reshape(*shape, r, -1)])

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Columns per input channel, a shuffle to order by output channel, rows."""
        columns, rows = self.kernels(layer, rank)
        kernel = kernel_of(layer)
        hidden = slide(writer, use, use.x, factors[0], columns, axes=(0,))
        order = kernel.group, kernel.inputs, kernel.outputs, rank[0]
        hidden = swap_groups(writer, hidden, order)
        rest = range(1, len(kernel.spatial))
        return slide(writer, use, hidden, factors[1], rows, axes=rest, bias=bias_of(use))
