"""svd: a MatMul or Gemm becomes two, through a bottleneck of r features."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.methods import (
    Array,
    ChainPass,
    Form,
    Layer,
    Rank,
    Shape,
    Use,
    Writer,
    truncated_svd,
    write_product,
)


class Svd(ChainPass):
    """W ≈ P·Q with P (…, a, r) and Q (…, r, b); the bias stays on the last node.

    Experts in a stack, of which a Gather picks some, have factors each.
    """

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "n→m as n→r, r→m"
    ops: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")
    paper: ClassVar[str] = "Eckart & Young 1936"
    automatic: ClassVar[bool] = True

    def refuse(self, layer: Layer) -> str | None:
        """Only matrices, and stacks of matrices; of a stack that is looked up, whole matrices."""
        if _picks_matrices(layer):
            return None
        if layer.kind != "matrix":
            return f"svd replaces {' and '.join(self.ops)}, not {layer.op}"
        if len(layer.shape) < 2:
            return f"the weight is a vector of {layer.params}, which has rank 1 already"
        operands = [use.x_axes for use in layer.uses] if len(layer.shape) > 2 else []
        if None in operands:
            return (
                "the weight is a stack of matrices, and the number of axes of the other operand is "
                "unknown or changes with the sizes of the inputs"
            )
        if any((axes or 0) < 2 for axes in operands):
            # Their product is a matrix, which the second factor would take for its rows.
            return "the weight is a stack of matrices and multiplies a vector"
        return None

    def full_rank(self, layer: Layer) -> Rank:
        """The smaller side of the matrix."""
        return (min(layer.shape[-2:]),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The weight as one stack of matrices: the leading axes of a batched MatMul, flattened."""
        return (layer.array().reshape(-1, *layer.shape[-2:]),)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """(…, a, r) and (…, r, b)."""
        *lead, a, b = layer.shape
        return (*lead, a, rank[0]), (*lead, rank[0], b)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD of every matrix in the stack."""
        factors = truncated_svd(self.unfoldings(layer)[0], rank[0])
        shapes = self.factor_shapes(layer, rank)
        return tuple(f.reshape(shape) for f, shape in zip(factors, shapes, strict=True))

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """P·Q."""
        return np.asarray(factors[0] @ factors[1])

    def form(self, layer: Layer) -> Form | None:
        """P·Q, or its transpose where the first axis is contracted, for every matrix alone."""
        return Form("ar,rb->ab" if layer.uses[0].contracts_last else "ar,rb->ba")

    def unpack(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> list[list[Array]]:
        """P and Q of each matrix of a stack."""
        stacks = (factor.reshape(-1, *factor.shape[-2:]) for factor in factors)
        return [list(pair) for pair in zip(*stacks, strict=True)]

    def pack(self, layer: Layer, rank: Rank, groups: list[list[Array]]) -> tuple[Array, ...]:
        """All P and all Q, in the axes of the stack."""
        shapes = self.factor_shapes(layer, rank)
        stacks = zip(*groups, strict=True)
        return tuple(np.stack(s).reshape(shape) for s, shape in zip(stacks, shapes, strict=True))

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Two nodes of the original's operator, in the order in which the data meets them.

        Of experts both factors are looked up, and multiplied to the matrices that were.
        """
        if use.node.op_type == "Gather":
            picked = [writer.op("Gather", [f, use.x], {"axis": 0}) for f in factors]
            return writer.op("MatMul", [*picked], {})
        return write_product(layer, use, factors, writer)


def _picks_matrices(layer: Layer) -> bool:
    """Whether a stack of matrices is looked up one or several at a time, as experts are."""
    return (
        layer.kind == "gather"
        and len(layer.shape) == 3
        and min(layer.shape[1:]) > 1
        and not any(layer.lookup_axis(use) or use.swapped for use in layer.uses)
    )
