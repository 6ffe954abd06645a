"""expand-at-load: any weight is stored as factors, and multiplied back when a session loads."""

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.methods import (
    Array,
    Grid,
    Layer,
    Rank,
    Shape,
    TiledPass,
    WeightPass,
    Writer,
    integers,
    join_tiles,
    tiled_svd,
)

_SIDES = (8, 16, 32, 64, 128, 256)  # of square tiles


class ExpandAtLoad(TiledPass, WeightPass):
    """W ≈ U·V, whole or tile by tile, as a MatMul of two initializers, which runtimes fold.

    The file is smaller, the run as it was. It exists for every stored weight: recurrent ones, tiles
    across kernel positions, weights that several operators share. The weight is taken as a matrix,
    its leading axes against the others, cut where the two sides are closest.
    """

    name: ClassVar[str] = "expand-at-load"
    summary: ClassVar[str] = "U·V on initializers: a smaller file, the same run"
    paper: ClassVar[str] = "Lee et al. 2019, arXiv 1905.10145"

    def refuse(self, layer: Layer) -> str | None:
        """Only what has no two sides."""
        _, m, n = self.sides(layer)
        if min(m, n) > 1:
            mask = layer.kind == "other" and not layer.is_finite()
            return "the weight holds infinite or NaN values, as masks do" if mask else None
        return f"expand-at-load has nothing to factorize in a weight of shape {layer.stored_shape}"

    def grids(self, layer: Layer) -> tuple[Grid, ...]:
        """The whole matrix, then square tiles."""
        _, m, n = self.sides(layer)
        tiled = ((m // s, n // s) for s in _SIDES if m % s == 0 and n % s == 0)
        return tuple(dict.fromkeys(((1, 1), *tiled)))

    def sides(self, layer: Layer) -> tuple[int, int, int]:
        """(1, m, n) with m·n elements, as square as the axes allow."""
        shape = layer.stored_shape
        splits = ((math.prod(shape[:i]), math.prod(shape[i:])) for i in range(len(shape) + 1))
        return (1, *max(splits, key=min))

    def matrices(self, layer: Layer) -> NDArray[np.generic]:
        """The stored weight as one matrix."""
        return layer.stored_array().reshape(self.sides(layer))

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """U (p, q, m/p, r) and V (p, q, r, n/q); two matrices where there is one tile."""
        (r, p, q), (_, m, n) = rank, self.sides(layer)
        lead = () if p * q == 1 else (p, q)
        return (*lead, m // p, r), (*lead, r, n // q)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD of every tile."""
        factors = tiled_svd(self.matrices(layer), *rank)
        shapes = self.factor_shapes(layer, rank)
        return tuple(f.reshape(shape) for f, shape in zip(factors, shapes, strict=True))

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """U·V, as the layer sees it."""
        tiles = factors[0] @ factors[1]
        whole = join_tiles(tiles.reshape(1, *rank[1:], *tiles.shape[-2:]))
        return layer.from_stored(whole.reshape(layer.stored_shape))

    def restore(
        self, layer: Layer, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The product of every tile, the tiles side by side, the stored shape."""
        whole = writer.op("MatMul", [*factors], {})
        if math.prod(rank[1:]) > 1:
            whole = writer.op("Transpose", [whole], {"perm": (0, 2, 1, 3)})
        elif len(layer.stored_shape) == 2:
            return whole
        return writer.op("Reshape", [whole, integers(writer, *layer.stored_shape)], {})
