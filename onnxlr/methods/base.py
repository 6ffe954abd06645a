"""What a method is: what it supports, its factors, and the nodes it writes."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, final

import onnx_ir as ir

from onnxlr.decompose import Form
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.ranks import RanksBySpectra
from onnxlr.methods.writer import Site, Writer
from onnxlr.types import Array, Rank, Shape


class GraphPass(RanksBySpectra):
    """One way to store a weight as factors; see ``ChainPass``, ``InputPass`` and ``WeightPass``.

    A pass states what it supports (a refusal carries its reason), what its factors are, and the
    nodes it writes; what they cost is counted on those. It keeps no state: one instance serves
    every layer of every model. What isn't abstract here is right as it is for most.
    """

    summary: ClassVar[str]
    ops: ClassVar[tuple[str, ...]]
    paper: ClassVar[str] = ""
    # Whether `--method auto` tries it too; if not, it is there when it is named.
    automatic: ClassVar[bool] = False
    # Whether factors are multiplied back when a session loads: every user stays as it is.
    at_load: ClassVar[bool] = False
    # Whether siblings (``Layer.siblings``) have the factor in common that meets their input: it is
    # stored and computed once, where all of them are replaced at one rank.
    shares: ClassVar[bool] = False

    @abstractmethod
    def refuse(self, layer: Layer) -> str | None:
        """Why the method doesn't exist for this layer; None if it does."""

    @abstractmethod
    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """Shapes of the factors that will be stored."""

    @abstractmethod
    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """The factors, in double precision and in the order of ``factor_shapes``."""

    @abstractmethod
    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """The weight that factors stand for, in the layer's shape."""

    @abstractmethod
    def barred(self, layer: Layer) -> str | None:
        """Why no method of this kind may replace the layer; None if one may."""

    @abstractmethod
    def install(self, layer: Layer, rank: Rank, site: Site) -> None:
        """Have the site write what the factors become: chains, or nodes that give the weight."""

    def form(self, layer: Layer) -> Form | None:
        """How one group's weight, as outputs × inputs, is made of factors; None if it isn't told.

        With it, factors can be fitted to what the layer does with its inputs.
        """
        return None

    def unpack(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> list[list[Array]]:
        """From the stored factors to those of the form, group by group."""
        return [list(factors)]

    def pack(self, layer: Layer, rank: Rank, groups: list[list[Array]]) -> tuple[Array, ...]:
        """From the factors of the form, group by group, to the stored ones."""
        (factors,) = groups
        return tuple(factors)

    def sketch(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Factors to begin fitting to a layer's inputs with: what a glance at an error needs."""
        return self.factorize(layer, rank)

    def follow(
        self, layers: Sequence[Layer], rank: Rank, factors: Sequence[tuple[Array, ...]]
    ) -> list[tuple[Array, ...]]:
        """Factors of equal layers whose weights have moved a little since they had ``factors``.

        The layers have one shape and one number of groups.
        """
        return [self.factorize(layer, rank) for layer in layers]


class UserPass(GraphPass):
    """A pass that writes nodes for every user of the weight: fewer parameters and fewer MACs."""

    @abstractmethod
    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Write the nodes for one user, and return the value of their output.

        They have to hold for all that may be fed: ``use.x_shape`` is what one feed showed, a number
        of axes to count on is ``use.x_axes``, sizes are read in the graph (``sizes_of``).
        """

    @final
    def barred(self, layer: Layer) -> str | None:
        """Why no user can have such nodes, whatever the method; None if all can."""
        return layer.refusal


class ChainPass(UserPass):
    """A pass whose factors become a chain of nodes, whose output takes the place of the user's."""

    @final
    def install(self, layer: Layer, rank: Rank, site: Site) -> None:
        """Put a chain in the place of every user."""
        for use in layer.uses:
            site.replace_use(use, partial(self.write, layer, use, rank))


class InputPass(UserPass):
    """A pass whose nodes give a user another input, with the last factor for its weight.

    It serves operators that multiply their input inside, and do more: the node stays.
    """

    @final
    def install(self, layer: Layer, rank: Rank, site: Site) -> None:
        """Put nodes in front of every user."""
        for use in layer.uses:
            site.replace_input(use, partial(self.write, layer, use, rank))


class WeightPass(GraphPass):
    """A pass that stores factors and leaves every user as it is: fewer parameters, the same MACs.

    It exists for any weight, whatever reads it, and sees it as it is stored.
    """

    ops: ClassVar[tuple[str, ...]] = ()
    at_load: ClassVar[bool] = True

    @abstractmethod
    def restore(
        self, layer: Layer, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Write the nodes that multiply the factors back to the stored weight."""

    @final
    def barred(self, layer: Layer) -> str | None:
        """Why the stored weight can't be replaced; what bars chains alone doesn't matter here."""
        return layer.weight_refusal

    @final
    def install(self, layer: Layer, rank: Rank, site: Site) -> None:
        """Put one product of the factors in the place of the stored weight."""
        site.replace_weight(partial(self.restore, layer, rank))
