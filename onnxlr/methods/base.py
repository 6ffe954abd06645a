"""What a method is: what it supports, its factors, and the nodes it writes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.decompose import Form, RankRule, Spectrum
from onnxlr.decompose.ranks import round_up
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.writer import Site, Writer
from onnxlr.types import Array, Rank, rank_text


class GraphPass(ABC):
    """One way to store a layer's weight as factors; see ``ChainPass`` and ``WeightPass``.

    A pass states what it supports (a refusal carries its reason), what its factors are, and the
    nodes it writes; what they cost is counted on those. It keeps no state: one instance serves
    every model.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    ops: ClassVar[tuple[str, ...]]
    paper: ClassVar[str] = ""
    # Whether `--method auto` tries it; the others are there when they are named.
    automatic: ClassVar[bool] = True
    # Whether factors are multiplied back when a session loads: every user stays as it is.
    at_load: ClassVar[bool] = False
    # How many numbers a named rank may have.
    numbers: ClassVar[tuple[int, ...]] = (1,)
    # The pass that takes over where the factors of this one are unusable.
    fallback: ClassVar[str] = ""

    @abstractmethod
    def refuse(self, layer: Layer) -> str | None:
        """Why the method doesn't exist for this layer; None if it does."""

    @abstractmethod
    def full_rank(self, layer: Layer) -> Rank:
        """The rank at which the chain is exact, without touching the weight."""

    @abstractmethod
    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """A stack of matrices (g, m, n) for each component of the rank, whose spectra decide it."""

    @abstractmethod
    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """Shapes of the factors that will be stored."""

    @abstractmethod
    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The factors, in double precision and in the order of ``factor_shapes``."""

    @abstractmethod
    def install(self, layer: Layer, rank: Rank, site: Site) -> None:
        """Have the site write what the factors become: chains, or nodes that give the weight."""

    def barred(self, layer: Layer) -> str | None:
        """Why no method of this kind may replace the layer; None if one may."""
        return layer.refusal

    def sketch(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Factors to begin fitting to a layer's inputs with: what a glance at an error needs."""
        return self.factorize(layer, rank)

    def follow(
        self, layers: Sequence[Layer], rank: Rank, factors: Sequence[tuple[Array, ...]]
    ) -> list[tuple[Array, ...]]:
        """Factors of equal layers whose weights have moved a little since ``factors`` were found.

        The layers have one shape and one number of groups.
        """
        return [self.factorize(layer, rank) for layer in layers]

    @abstractmethod
    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """The weight that factors stand for, in the layer's shape."""

    def form(self, layer: Layer, rank: Rank) -> Form | None:
        """How one group's weight, as outputs × inputs, is made of factors; None if it isn't told.

        With it, factors can be fitted to what the layer does with its inputs.
        """
        return None

    def unpack(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> list[list[Array]]:
        """From the stored factors to those of the form, group by group."""
        raise NotImplementedError

    def pack(self, layer: Layer, rank: Rank, groups: list[list[Array]]) -> tuple[Array, ...]:
        """From the factors of the form, group by group, to the stored ones."""
        raise NotImplementedError

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

    def select(
        self,
        layer: Layer,
        rule: RankRule,
        spectra: Sequence[Spectrum],
        precision: float,
        limit: Rank,
    ) -> Rank | str:
        """The rank that a rule other than ``auto`` gives, or why it gives none.

        A component is 0 where the rule finds nothing to keep. ``limit`` is the rank at break-even,
        for methods whose ranks have no other measure.
        """
        if (reason := self.takes(rule)) is not None:
            return reason
        full = self.full_rank(layer)
        if not rule.needs_spectrum:
            return tuple(rule.of_full(r, i) for i, r in enumerate(full))
        return tuple(rule.select(s.values, s.m, s.n, precision) for s in spectra)

    def takes(self, rule: RankRule) -> str | None:
        """Why a rule names too many or too few numbers for the method; None if it doesn't."""
        if len(rule.numbers) in (0, *self.numbers):
            return None
        wanted = " or ".join(map(str, self.numbers))
        return (
            f"{self.name} takes {wanted} number{'s' if self.numbers != (1,) else ''}, --rank "
            f"{rule} names {len(rule.numbers)}"
        )

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


class ChainPass(GraphPass):
    """A pass whose factors become nodes of their own: fewer parameters and fewer MACs."""

    def install(self, layer: Layer, rank: Rank, site: Site) -> None:
        """A chain in the place of every user."""
        for use in layer.uses:
            site.replace_use(use, partial(self.write, layer, use, rank))

    @abstractmethod
    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Write the chain that replaces one user, and return the value of its output.

        It has to hold for all that may be fed: ``use.x_shape`` is what one feed showed, a number of
        axes to count on is ``use.x_axes``, sizes are read in the graph (``sizes_of``).
        """


class WeightPass(GraphPass):
    """A pass that stores factors and leaves every user as it is: fewer parameters, the same MACs.

    It exists for any weight, whatever reads it, and is given it as it is stored.
    """

    ops: ClassVar[tuple[str, ...]] = ()
    automatic: ClassVar[bool] = False
    at_load: ClassVar[bool] = True

    def barred(self, layer: Layer) -> str | None:
        """Why the stored weight can't be replaced; what bars chains alone doesn't matter."""
        return layer.weight_refusal

    def install(self, layer: Layer, rank: Rank, site: Site) -> None:
        """One product of the factors in the place of the stored weight."""
        site.replace_weight(partial(self.restore, layer, rank))

    @abstractmethod
    def restore(
        self, layer: Layer, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Write the nodes that multiply the factors back to the stored weight."""
