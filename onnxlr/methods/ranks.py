"""Which ranks a method has for a layer, and which of them a rule or an error names."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose import RankRule, Spectrum
from onnxlr.decompose.ranks import round_up
from onnxlr.layers.layer import Layer
from onnxlr.types import Rank, rank_text


class RanksBySpectra(ABC):
    """Ranks that are chosen by the singular values of unfoldings: one for each unfolding.

    It is the part of a method that few methods change: those whose rank is more than that
    (``TiledPass``), or whose error no spectrum tells (``CpPass``).
    """

    name: ClassVar[str]
    # How many numbers a rank may have that a user names.
    numbers: ClassVar[tuple[int, ...]] = (1,)
    # The method that takes over where the factors of this one are unusable.
    fallback: ClassVar[str] = ""

    @abstractmethod
    def full_rank(self, layer: Layer) -> Rank:
        """The rank at which the factors are exact, from shapes alone: the weight isn't read."""

    @abstractmethod
    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """A stack of matrices (g, m, n) for each component of the rank, whose spectra decide it."""

    def ladder(self, layer: Layer) -> tuple[Rank, ...]:
        """Ranks from the smallest to the full one, in proportion to it."""
        full = self.full_rank(layer)
        top = max(full)
        return tuple(tuple(-(-r * step // top) for r in full) for step in range(1, top + 1))

    def turned(self, rank: Rank) -> Rank:
        """The rank of the same factors for the transposed matrix."""
        return rank

    def misfit(self, layer: Layer, rank: Rank) -> str | None:
        """Why a rank is none of this method's for a layer it doesn't refuse; None if it is."""
        full = self.full_rank(layer)
        if len(rank) == len(full) and all(0 < r <= f for r, f in zip(rank, full, strict=True)):
            return None
        return f"rank {rank_text(rank)} is not within {rank_text(full)}"

    @final
    def takes(self, rule: RankRule) -> str | None:
        """Why a rule names too many or too few numbers for the method; None if it doesn't."""
        if len(rule.numbers) in (0, *self.numbers):
            return None
        counts = " or ".join(map(str, self.numbers))
        return (
            f"{self.name} takes {counts} number{'s' if self.numbers != (1,) else ''}, --rank "
            f"{rule} names {len(rule.numbers)}"
        )

    def select(
        self,
        layer: Layer,
        rule: RankRule,
        spectra: Sequence[Spectrum],
        precision: float,
        limit: Rank,
    ) -> Rank | str:
        """The rank that a rule other than ``auto`` gives, or why it gives none.

        A component is 0 where no singular value is above what the rule calls noise. ``limit`` is
        the rank at break-even, for methods whose ranks have no other measure.
        """
        if (reason := self.takes(rule)) is not None:
            return reason
        if not rule.needs_spectrum:
            return tuple(rule.of_full(r, i) for i, r in enumerate(self.full_rank(layer)))
        return tuple(rule.select(s.values, s.m, s.n, precision) for s in spectra)

    def ranks_within(
        self,
        layer: Layer,
        error: float,
        spectra: Sequence[Spectrum],
        limit: Rank,
        *,
        gridded: bool,
    ) -> Iterable[Rank]:
        """Ranks whose weight error is within a limit, at least one; gridded as kernels are."""
        shares: tuple[tuple[float, ...], ...] = ((1.0,),)
        if len(spectra) == 2:  # the error may come from one side more than from the other
            shares = tuple((w, 1 - w) for w in (0.5, 0.3, 0.7, 0.1, 0.9, 0.02, 0.98))
        # One rank must stay below break-even; of two, one may be high while the other is low.
        caps = limit if len(spectra) == 1 else self.full_rank(layer)
        for share in shares:
            rank = []
            for part, spectrum, cap in zip(share, spectra, caps, strict=True):
                needed = max(1, int(np.argmax(spectrum.errors <= error * np.sqrt(part))))
                rank.append(round_up(needed, cap) if gridded else needed)
            yield tuple(rank)

    def unusable(self, layer: Layer, rank: Rank) -> str | None:
        """Why the factors of a rank must not be used, where only factorizing shows it."""
        return None
