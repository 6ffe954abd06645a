"""What the passes share that cut a weight into tiles: the grids, and a rank with its grid."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose import RankRule, Spectrum, cut_tiles, spectrum_of
from onnxlr.decompose.ranks import rank_for_error, round_up
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.system.memo import Memo
from onnxlr.types import Rank, rank_text

Grid = tuple[int, int]

_SPECTRA = Memo[Spectrum](512)


class TiledPass(GraphPass):
    """SVD of every tile of a weight; a rank is (r, p, q), r for each tile of a p × q grid.

    A rule that names no grid gets the first that fits. Where an error decides, every grid is
    looked at, and the one with the fewest parameters wins.
    """

    numbers: ClassVar[tuple[int, ...]] = (1, 3)

    @abstractmethod
    def grids(self, layer: Layer) -> tuple[Grid, ...]:
        """The grids that are looked at, the default one first; empty if none fits."""

    @abstractmethod
    def matrices(self, layer: Layer) -> NDArray[np.generic]:
        """The weight as a stack of matrices (g, m, n), each of which is cut."""

    @abstractmethod
    def sides(self, layer: Layer) -> tuple[int, int, int]:
        """Shape (g, m, n) of that stack."""

    def grid_misfit(self, layer: Layer, grid: Grid) -> str | None:
        """Why a grid can't be had; None if it can."""
        _, m, n = self.sides(layer)
        if m % grid[0] or n % grid[1]:
            return f"{grid[0]}×{grid[1]} tiles don't divide the {m}×{n} weight"
        return None

    def full_rank(self, layer: Layer) -> Rank:
        """The smaller side of a tile, on the default grid."""
        grid = self.grids(layer)[0]
        return (self._full(layer, grid), *grid)

    def ladder(self, layer: Layer) -> tuple[Rank, ...]:
        """Every rank on the default grid."""
        full, *grid = self.full_rank(layer)
        return tuple((r, *grid) for r in range(1, full + 1))

    def turned(self, rank: Rank) -> Rank:
        """Rows and columns of tiles change places."""
        r, p, q = rank
        return r, q, p

    def misfit(self, layer: Layer, rank: Rank) -> str | None:
        """Ranks without a grid, or beyond their tiles."""
        if len(rank) != 3:
            return f"rank {rank_text(rank)} names no grid of tiles (r,p,q)"
        grid = rank[1:]
        if (reason := self.grid_misfit(layer, (grid[0], grid[1]))) is not None:
            return reason
        full = self._full(layer, (grid[0], grid[1]))
        if 0 < rank[0] <= full:
            return None
        return f"rank {rank[0]} of {grid[0]}×{grid[1]} tiles is not within {full}"

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """All tiles of the default grid."""
        return (self._tiles(layer, self.grids(layer)[0]),)

    def select(
        self,
        layer: Layer,
        rule: RankRule,
        spectra: Sequence[Spectrum],
        precision: float,
        limit: Rank,
    ) -> Rank | str:
        """A number, (r, p, q), or a rule that looks at the tiles of one grid or of all."""
        if (reason := self.takes(rule)) is not None:
            return reason
        grids = self.grids(layer)
        if rule.kind == "number":
            grid = (rule.numbers[1], rule.numbers[2]) if len(rule.numbers) == 3 else grids[0]
            if (reason := self.grid_misfit(layer, grid)) is not None:
                return f"{self.name}: {reason}"
            return (min(rule.numbers[0], self._full(layer, grid)), *grid)
        if rule.kind == "fraction":
            return (rule.of_full(self._full(layer, grids[0])), *grids[0])
        if rule.kind == "evbmf":
            s = spectra[0]
            return (rule.select(s.values, s.m, s.n, precision), *grids[0])
        ranks = []
        for grid in grids:
            s = self._spectrum(layer, grid)
            ranks.append((rule.select(s.values, s.m, s.n, precision), *grid))
        return min(ranks, key=lambda rank: self._size(layer, rank))

    def ranks_within(
        self,
        layer: Layer,
        error: float,
        spectra: Sequence[Spectrum],
        limit: Rank,
        *,
        gridded: bool,
    ) -> Iterator[Rank]:
        """On every grid of tiles the smallest rank within the error."""
        for grid in self.grids(layer):
            needed = max(1, rank_for_error(self._spectrum(layer, grid).values, error))
            cap = min(self._full(layer, grid), (layer.params - 1) // self._size(layer, (1, *grid)))
            yield (round_up(needed, cap) if gridded else needed, *grid)

    def _full(self, layer: Layer, grid: Grid) -> int:
        _, m, n = self.sides(layer)
        return min(m // grid[0], n // grid[1])

    def _size(self, layer: Layer, rank: Rank) -> int:
        """Parameters of the factors: r·(m·q + p·n) for each matrix."""
        g, m, n = self.sides(layer)
        r, p, q = rank
        return g * r * (m * q + p * n)

    def _tiles(self, layer: Layer, grid: Grid) -> NDArray[np.generic]:
        tiles = cut_tiles(self.matrices(layer), *grid)
        return tiles.reshape(-1, *tiles.shape[3:])

    def _spectrum(self, layer: Layer, grid: Grid) -> Spectrum:
        tiles = self._tiles(layer, grid)
        return _SPECTRA.get(tiles, None, partial(spectrum_of, tiles))
