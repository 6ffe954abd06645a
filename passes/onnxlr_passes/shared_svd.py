"""shared-svd: layers with one input have its product with r features in common."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.methods import (
    Array,
    ConvPass,
    Form,
    Layer,
    Rank,
    Shape,
    Use,
    Writer,
    stack_of,
    stack_shape,
    truncated_svd,
    write_product,
)

# Each sibling's factors come from the whole stack, which is decomposed for each of them anew.
_MOST, _LARGEST = 8, 1 << 25  # siblings, and elements of all their weights


class SharedSvd(ConvPass):
    """SVD of the weights of all siblings upon each other; each has its rows of the one factor.

    Of three square weights 4·r·n products are left where svd leaves 6·r·n. Weights are divided by
    their norms before, so that a small one counts as much as a large one.
    """

    name: ClassVar[str] = "shared-svd"
    summary: ClassVar[str] = "all n→m of one input as n→r once, r→m each"
    ops: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm", "Conv")
    paper: ClassVar[str] = "Eckart & Young 1936"
    automatic: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    equation: ClassVar[str] = "rsp,tr->tsp"

    def refuse(self, layer: Layer) -> str | None:
        """Only matrices and convolutions whose input others read in the same way."""
        if layer.kind not in ("matrix", "conv"):
            return f"{self.name} replaces {', '.join(self.ops)}, not {layer.op}"
        if not layer.siblings:
            return f"{self.name}: no other layer reads its input in the same way"
        outputs, inputs = stack_shape(layer)
        if len(layer.siblings) > _MOST or outputs * inputs > _LARGEST:
            return (
                f"{self.name}: {len(layer.siblings)} layers of {outputs:,} outputs read its input, "
                "too many to be decomposed together"
            )
        return None

    def form(self, layer: Layer) -> Form:
        """That of channel-svd for a convolution, of svd for a matrix."""
        if layer.convolves:
            return super().form(layer)
        return Form("ar,rb->ab" if layer.uses[0].contracts_last else "ar,rb->ba")

    def full_rank(self, layer: Layer) -> Rank:
        """The smaller side of the stack."""
        return (min(stack_shape(layer)),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The stack."""
        return (stack_of(layer, _norm).matrix[None],)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """Two kernels, or (a, r) and (r, b)."""
        if layer.convolves:
            return super().factor_shapes(layer, rank)
        a, b = layer.shape
        return (a, rank[0]), (rank[0], b)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD of the stack, and the layer's rows of its left factor."""
        stack = stack_of(layer, _norm)
        (u,), (inner,) = truncated_svd(stack.matrix[None], rank[0])
        outer = stack.size * u[stack.rows]
        if layer.convolves:
            shape = (*inner.shape[:1], layer.shape[1], -1)
            return self.pack(layer, rank, [[inner.reshape(shape), outer]])
        return (outer, inner) if layer.uses[0].contracts_last else (inner.T, outer.T)

    def unpack(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> list[list[Array]]:
        """As in channel-svd, or both factors of the matrix."""
        return super().unpack(layer, rank, factors) if layer.convolves else [list(factors)]

    def pack(self, layer: Layer, rank: Rank, groups: list[list[Array]]) -> tuple[Array, ...]:
        """As in channel-svd, or both factors of the matrix."""
        return super().pack(layer, rank, groups) if layer.convolves else tuple(groups[0])

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """The product of both factors."""
        if layer.convolves:
            return super().compose(layer, rank, factors)
        return np.asarray(factors[0] @ factors[1])

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Two nodes of the original's operator."""
        if layer.convolves:
            return super().write(layer, use, rank, factors, writer)
        return write_product(layer, use, factors, writer)


def _norm(weight: Array) -> float:
    return float(np.linalg.norm(weight))
