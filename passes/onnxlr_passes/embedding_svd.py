"""embedding-svd: a Gather from a V × d table becomes one from V × r, and a MatMul r → d.

A table that is multiplied too, as language models tie theirs to the last layer, has the same two
factors there: d → r, r → V.
"""

import math
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
    reshaped,
    sizes_of,
    truncated_svd,
    write_product,
)


class EmbeddingSvd(ChainPass):
    """E ≈ P·Q with P (V, r) looked up and Q (r, d) multiplied.

    V are the entries along the axis that is indexed, wherever it stands; d are all the others.
    """

    name: ClassVar[str] = "embedding-svd"
    summary: ClassVar[str] = "V×d table along any axis, tied too, as V×r, r×d"
    ops: ClassVar[tuple[str, ...]] = ("Gather",)
    paper: ClassVar[str] = "Lan et al. 2019, arXiv 1909.11942"
    automatic: ClassVar[bool] = True

    def refuse(self, layer: Layer) -> str | None:
        """Tables of two axes or more, indexed along the same one by all users."""
        if layer.kind not in ("gather", "tied"):
            return f"embedding-svd replaces Gather, not {layer.op}"
        axes = {layer.lookup_axis(use) for use in layer.uses if use.node.op_type == "Gather"}
        if len(axes) > 1:
            return "embedding-svd: the nodes that use it look up along different axes"
        if layer.kind == "tied" and len(layer.shape) != 2:
            return "embedding-svd: the table is also multiplied, and hasn't two axes"
        if 1 in (_sides(layer)):
            return f"embedding-svd has nothing to factorize in a table of shape {layer.shape}"
        return None

    def full_rank(self, layer: Layer) -> Rank:
        """The smaller side of the table."""
        return (min(_sides(layer)),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The table, the axis that is indexed first."""
        table = np.moveaxis(layer.array(), layer.lookup_axis(layer.uses[0]), 0)
        return (table.reshape(1, *_sides(layer)),)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """(V, r) and (r, d)."""
        entries, width = _sides(layer)
        return (entries, rank[0]), (rank[0], width)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD of the table."""
        u, v = truncated_svd(self.unfoldings(layer)[0], rank[0])
        return u[0], v[0]

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """P·Q, the axis that is indexed put back."""
        axis = layer.lookup_axis(layer.uses[0])
        others = _without(layer.shape, axis)
        return np.moveaxis((factors[0] @ factors[1]).reshape(-1, *others), 0, axis)

    def form(self, layer: Layer) -> Form:
        """(P·Q)ᵀ: what is given for an entry, by entries."""
        return Form("vr,rd->dv")

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The same lookup in the narrow table, then the product; the two products of a tied one."""
        if use.node.op_type != "Gather":
            if layer.lookup_axis(layer.uses[0]) == 1:  # then the table is (P·Q)ᵀ = Qᵀ·Pᵀ
                p, q = (writer.op("Transpose", [f], {"perm": (1, 0)}) for f in factors)
                factors = q, p
            return write_product(layer, use, factors, writer)
        axis = layer.lookup_axis(use)
        if len(layer.shape) == 2 and axis == 0 and not use.swapped:
            rows = writer.op("Gather", [factors[0], use.x], {"axis": 0})
            return writer.op("MatMul", [rows, factors[1]], {})

        axes = list(range(len(layer.shape)))
        if use.swapped:
            axes[-2:] = axes[:-3:-1]
        place = axes.index(axis)  # where the user has the axis that is indexed
        remaining = [a for a in axes if a != axis]
        order = [a for a in range(len(axes)) if a != axis]
        others = _without(layer.shape, axis)
        # Where nobody knows how many axes the indices have, they are looked up as one.
        counted = use.x_axes is not None
        front = 1 if use.x_axes is None else use.x_axes
        indices = use.x if counted else reshaped(writer, use.x, (-1,))
        rows = writer.op("Gather", [factors[0], indices], {"axis": 0})
        product = writer.op("MatMul", [rows, factors[1]], {})
        if len(others) > 1:
            product = reshaped(writer, product, (*[0 if counted else -1] * front, *others))
        perm = [front + order.index(a) for a in remaining]
        perm[place:place] = range(front)
        moved = writer.op("Transpose", [product], {"perm": tuple(perm)})
        if counted:
            return moved
        sizes = tuple(layer.shape[a] for a in remaining)
        read = sizes_of(writer, use.x, None, None)
        return reshaped(writer, moved, sizes[:place], read, sizes[place:])


def _sides(layer: Layer) -> tuple[int, int]:
    entries = layer.shape[layer.lookup_axis(layer.uses[0])]
    return entries, math.prod(layer.shape) // entries


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])
