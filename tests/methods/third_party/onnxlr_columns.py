"""columns: a product with W becomes one with r of W's columns, then one that mixes them."""

import numpy as np
import onnx_ir as ir
import scipy.linalg

from onnxlr.methods import Array, ChainPass, Form, Layer, Rank, Shape, Use, Writer


class Columns(ChainPass):
    """W ≈ C·X with C the columns of W that a pivoted QR picks, and X by least squares."""

    name = "columns"
    summary = "MatMul n→m as n→r with columns of the weight, r→m"
    ops = ("MatMul",)
    paper = "Cheng et al. 2005 (interpolative decomposition)"

    def refuse(self, layer: Layer) -> str | None:
        if layer.kind != "matrix" or len(layer.shape) != 2:
            return f"columns needs one matrix, not the {layer.op} of shape {layer.shape}"
        if any(u.node.op_type != "MatMul" or u.slot != 1 or u.swapped for u in layer.uses):
            return "columns needs MatMuls with the weight as it is stored, on the right"
        return None

    def full_rank(self, layer: Layer) -> Rank:
        return (min(layer.shape),)

    def unfoldings(self, layer: Layer) -> tuple[np.ndarray, ...]:
        return (layer.array()[None],)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        n, m = layer.shape
        return (n, rank[0]), (rank[0], m)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        weight = layer.array().astype(np.float64)
        order = scipy.linalg.qr(weight, mode="r", pivoting=True)[1]
        columns = weight[:, order[: rank[0]]]
        return columns, np.linalg.pinv(columns) @ weight

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        return factors[0] @ factors[1]

    def form(self, layer: Layer) -> Form:
        return Form("nr,rm->mn")  # outputs × inputs

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        hidden = writer.op("MatMul", [use.x, factors[0]], {})
        return writer.op("MatMul", [hidden, factors[1]], {})
