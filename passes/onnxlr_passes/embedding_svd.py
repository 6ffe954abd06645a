"""embedding-svd: a Gather from a V × d table becomes one from V × r, and a MatMul r → d."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.decompose import truncated_svd
from onnxlr.graph_pass import Array, GraphPass, Rank, Writer
from onnxlr.layers import Layer, Use
from onnxlr.model import int_attr


class EmbeddingSvd(GraphPass):
    """E ≈ P·Q with P (V, r) looked up and Q (r, d) multiplied."""

    name: ClassVar[str] = "embedding-svd"
    summary: ClassVar[str] = "V×d table as V×r table, MatMul r→d"
    ops: ClassVar[tuple[str, ...]] = ("Gather",)
    paper: ClassVar[str] = "Lan et al. 2019, arXiv 1909.11942 (factorized embedding)"

    def refuse(self, layer: Layer) -> str | None:
        """Tables of rows, each looked up whole."""
        if layer.kind != "gather":
            return f"embedding-svd replaces Gather, not {layer.op}"
        if len(layer.shape) != 2:
            return f"embedding-svd needs a table of rows, the weight has shape {layer.shape}"
        if any(_axis(use) != 0 or use.swapped for use in layer.uses):
            return "embedding-svd needs lookups of whole rows, along axis 0"
        return None

    def full_rank(self, layer: Layer) -> Rank:
        """The smaller side of the table."""
        return (min(layer.shape),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The table."""
        return (layer.array()[None],)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """(V, r) and (r, d)."""
        return (layer.shape[0], rank[0]), (rank[0], layer.shape[1])

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD of the table."""
        u, v = truncated_svd(self.unfoldings(layer)[0], rank[0])
        return u[0], v[0]

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The same lookup in the narrow table, then the product."""
        rows = writer.op("Gather", [factors[0], use.x], {"axis": 0})
        return writer.op("MatMul", [rows, factors[1]], {})


def _axis(use: Use) -> int:
    axis = int_attr(use.node, "axis", 0)
    return axis + 2 if axis < 0 else axis
