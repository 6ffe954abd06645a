"""input-svd: the input of a recurrent or an attention operator goes through r features."""

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.methods import (
    Array,
    Form,
    InputPass,
    Layer,
    Rank,
    Shape,
    Use,
    Writer,
    truncated_svd,
)


class InputSvd(InputPass):
    """W ≈ U·V: a MatMul by V in front, and U for the weight of the operator.

    Of a recurrent operator all gates and directions meet one input, so that they have V in common.
    """

    name: ClassVar[str] = "input-svd"
    summary: ClassVar[str] = "input n as MatMul n→r in front, weight r→m"
    ops: ClassVar[tuple[str, ...]] = ("LSTM", "GRU", "RNN", "Attention")
    paper: ClassVar[str] = "Eckart & Young 1936"
    automatic: ClassVar[bool] = True

    def refuse(self, layer: Layer) -> str | None:
        """Only the weights that meet the input; what meets the hidden state stays."""
        if layer.kind != "projection":
            ops = ", ".join(self.ops)
            return f"{self.name} replaces the input's weight of {ops}, not this one of {layer.op}"
        return None

    def form(self, layer: Layer) -> Form:
        """V with the inputs first, as a MatMul has it, and U as the operator has it."""
        return Form("nr,mr->mn" if self._is_recurrent(layer) else "nr,rm->mn")

    def full_rank(self, layer: Layer) -> Rank:
        """The smaller side."""
        return (min(self._sides(layer)),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The weight as inputs × outputs, or the reverse."""
        array = layer.array()
        return (array.reshape(1, -1, array.shape[-1]),)

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """(n, r), and the weight's shape with r inputs."""
        if self._is_recurrent(layer):
            return (layer.shape[-1], rank[0]), (*layer.shape[:-1], rank[0])
        return (layer.shape[0], rank[0]), (rank[0], layer.shape[1])

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD."""
        (left,), (right,) = truncated_svd(self.unfoldings(layer)[0], rank[0])
        if not self._is_recurrent(layer):
            return left, right
        return right.T, left.reshape(self.factor_shapes(layer, rank)[1])

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """The weight."""
        inner, outer = factors
        return np.asarray(outer @ inner.T if self._is_recurrent(layer) else inner @ outer)

    def unpack(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> list[list[Array]]:
        """V, and U as a matrix."""
        inner, outer = factors
        return [[inner, outer.reshape(-1, rank[0]) if self._is_recurrent(layer) else outer]]

    def pack(self, layer: Layer, rank: Rank, groups: list[list[Array]]) -> tuple[Array, ...]:
        """V, and U with its directions."""
        ((inner, outer),) = groups
        return inner, outer.reshape(self.factor_shapes(layer, rank)[1])

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """A MatMul over the last axis of the input."""
        return writer.op("MatMul", [use.x, factors[0]], {})

    def _sides(self, layer: Layer) -> tuple[int, int]:
        return math.prod(layer.shape[:-1]), layer.shape[-1]

    def _is_recurrent(self, layer: Layer) -> bool:
        return len(layer.shape) == 3
