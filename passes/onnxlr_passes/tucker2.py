"""tucker2: a convolution becomes 1×1 to fewer inputs, a small core, and 1×1 to all outputs."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from onnxlr.methods import Array, ConvPass, Layer, Rank, kernel_of, tucker2


class Tucker2(ConvPass):
    """Tucker decomposition along the channels, ranks (r_s, r_t), in each group alone.

    The core slides as the original did; the bias is on the last node.
    """

    name: ClassVar[str] = "tucker2"
    summary: ClassVar[str] = "S→T as 1×1 conv S→r_s, k×k conv r_s→r_t, 1×1 conv r_t→T"
    numbers: ClassVar[tuple[int, ...]] = (1, 2)
    paper: ClassVar[str] = "Kim et al. 2015, arXiv 1511.06530"
    automatic: ClassVar[bool] = True
    equation: ClassVar[str] = "xs,yxp,ty->tsp"

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Higher-order orthogonal iteration from the truncated higher-order SVD."""
        kernels = kernel_of(layer).load(layer.array())
        return self._store_tucker(layer, rank, *tucker2(kernels, (rank[0], rank[1])))

    def sketch(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The truncated higher-order SVD."""
        kernels = kernel_of(layer).load(layer.array())
        return self._store_tucker(layer, rank, *tucker2(kernels, (rank[0], rank[1]), sweeps=0))

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
        # Those that were fitted to a layer's inputs aren't orthonormal.
        start, _ = np.linalg.qr(np.stack(starts))
        stacks = tucker2(kernels, (rank[0], rank[1]), start=start)
        parts = [np.split(stack, len(layers)) for stack in stacks]
        return [
            self._store_tucker(item, rank, v, core, u)
            for item, v, core, u in zip(layers, *parts, strict=True)
        ]

    def _store_tucker(
        self, layer: Layer, rank: Rank, v: Array, core: Array, u: Array
    ) -> tuple[Array, ...]:
        return self.store(layer, rank, [v.transpose(0, 2, 1), core, u])
