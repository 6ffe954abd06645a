"""What the two CP passes share: the decomposition of a layer, and ranks that it has to try."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose import Cp, RankRule, Spectrum, cp, exact_rank, spectrum_of
from onnxlr.layers.kernel import kernel_of
from onnxlr.layers.layer import Layer
from onnxlr.methods.convolution import ConvPass, refuse_other_ops
from onnxlr.methods.letters import Letters
from onnxlr.system.memo import Memo
from onnxlr.types import Array, Rank, Shape

_GRID = 8  # the multiple that CP ranks are rounded up to
_CPS = Memo[Cp](256)


class CpPass(ConvPass):
    """A convolution as a sum of R outer products, one group only.

    No spectrum tells the error of a CP rank: it takes the decomposition itself. So a CP is never
    tried unasked, and where the error decides, ranks are bisected by decomposing.
    """

    fallback: ClassVar[str] = "tucker2"

    def refuse(self, layer: Layer) -> str | None:
        """Ungrouped convolutions with a kernel larger than 1×1."""
        if (reason := refuse_other_ops(layer, self.name)) is not None:
            return reason
        kernel = kernel_of(layer)
        if kernel.group > 1:
            return f"{self.name} takes ungrouped convolutions, this one has {kernel.group} groups"
        if kernel.positions == 1:
            return f"{self.name} has nothing to separate in a {kernel.extent} kernel"
        return None

    def full_rank(self, layer: Layer) -> Rank:
        """A rank at which any kernel of this shape has an exact decomposition."""
        return (exact_rank(self._tensor_shape(layer)),)

    def unfoldings(self, layer: Layer) -> tuple[NDArray[np.generic], ...]:
        """The mode-S and the mode-T unfolding."""
        kernel = kernel_of(layer)
        array = kernel.load(layer.array())
        inputs = array.transpose(0, 2, 1, 3).reshape(1, kernel.inputs, -1)
        return inputs, array.reshape(1, kernel.outputs, -1)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Stable CP."""
        return self._store_cp(layer, rank, self.decompose(layer, rank[0]))

    def sketch(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """A CP from one start, with the ridge."""
        rough = cp(self._tensor(layer), rank[0], starts=1, thorough=False)
        return self._store_cp(layer, rank, rough)

    def follow(
        self, layers: Sequence[Layer], rank: Rank, factors: Sequence[tuple[Array, ...]]
    ) -> list[tuple[Array, ...]]:
        """A CP of each kernel that starts from the factors of the kernel nearby."""
        followed = []
        for layer, stored in zip(layers, factors, strict=True):
            inputs, *axes, outputs = self.unpack(layer, rank, stored)[0]
            near = (outputs, inputs.T, *(axis.T for axis in axes))
            moved = cp(self._tensor(layer), rank[0], near=near)
            followed.append(self._store_cp(layer, rank, moved))
        return followed

    def decompose(self, layer: Layer, rank: int) -> Cp:
        """The CP of a layer's kernel, kept for the next who asks for the same."""
        tensor = np.ascontiguousarray(self._tensor(layer))
        return _CPS.get(tensor, rank, partial(cp, tensor, rank))

    def _store_cp(self, layer: Layer, rank: Rank, decomposed: Cp) -> tuple[Array, ...]:
        """Inputs, lines along the axes, outputs: as the kernels of the chain."""
        outputs, inputs, *axes = decomposed.factors
        return self.store(layer, rank, [inputs.T, *(axis.T for axis in axes), outputs])

    def _tensor(self, layer: Layer) -> NDArray[np.generic]:
        """The kernel with the modes that are separated."""
        return kernel_of(layer).load(layer.array()).reshape(self._tensor_shape(layer))

    def _tensor_shape(self, layer: Layer) -> Shape:
        """The modes that are separated: outputs, inputs, then positions as the form has them."""
        form = self.form(layer)
        return Letters(form, kernel_of(layer)).shape(form.result)

    def select(
        self,
        layer: Layer,
        rule: RankRule,
        spectra: Sequence[Spectrum],
        precision: float,
        limit: Rank,
    ) -> Rank | str:
        """The rank of a rule: the unfoldings' largest for ``evbmf``, rounded up to 8.

        A fraction is one of the rank at break-even. ``exact`` and ``energy`` search for the
        smallest rank up to break-even whose decomposition is that close; ``exact`` first looks at
        the rank of the unfoldings, which a kernel that was made of so many components has.
        """
        (full,) = self.full_rank(layer)
        if rule.kind == "number":
            return super().select(layer, rule, spectra, precision, limit)
        if rule.kind == "fraction":
            return (max(1, round(rule.value * limit[0])),)
        if rule.kind == "evbmf":
            top = max(rule.select(s.values, s.m, s.n, precision) for s in spectra)
            return (min(full, -(-top // _GRID) * _GRID),)
        # A decomposition by iteration is exact to its tolerance, not to the last bit.
        error = max(precision, 1e-6) if rule.kind == "exact" else float(np.sqrt(1 - rule.value))
        if rule.kind == "exact":
            spectra = [*spectra, *map(spectrum_of, self._paired(layer))]
        least = max(1, *(int(np.argmax(s.errors <= error)) for s in spectra))
        if rule.kind == "exact" and least <= limit[0] and self._close(layer, error, least):
            return (least,)
        return (self._search(layer, error, least, max(limit[0], 1), step=1) or full,)

    def ranks_within(
        self,
        layer: Layer,
        error: float,
        spectra: Sequence[Spectrum],
        limit: Rank,
        *,
        gridded: bool,
    ) -> Iterator[Rank]:
        """The smallest rank on a grid of 8 whose decomposition is within the error."""
        # No CP has a smaller rank than each of its unfoldings has.
        least = max(max(int(np.argmax(s.errors <= error)) for s in spectra), 1)
        least = -(-least // _GRID) * _GRID
        close = self._search(layer, error, least, max(limit[0], 1), _GRID)
        yield (close or self.full_rank(layer)[0],)

    def unusable(self, layer: Layer, rank: Rank) -> str | None:
        """Degenerate decompositions, whose components cancel each other."""
        decomposed = self.decompose(layer, rank[0])
        if not decomposed.degenerate:
            return None
        return (
            f"{self.name} of rank {rank[0]} degenerates (its components' squares sum to "
            f"{decomposed.growth:.3g} times the kernel's)"
        )

    def _search(self, layer: Layer, error: float, least: int, most: int, step: int) -> int | None:
        """Bisect the ranks least, least + step, … up to most; None if none is close enough."""
        ranks = range(least, most + 1, step)
        close = partial(self._close, layer, error)
        if not ranks or not close(ranks[-1]):
            return None
        return _first(ranks, close)

    def _close(self, layer: Layer, error: float, rank: int) -> bool:
        decomposed = self.decompose(layer, rank)
        return not decomposed.degenerate and decomposed.error <= error

    def _paired(self, layer: Layer) -> Iterator[NDArray[np.generic]]:
        """Unfoldings with an axis on each side, whose ranks go beyond the channels."""
        tensor = self._tensor(layer)
        for axis in range(2, tensor.ndim):
            rows = np.moveaxis(tensor, axis, 1)
            yield rows.reshape(1, rows.shape[0] * rows.shape[1], -1)


def _first(ranks: range, close: Callable[[int], bool]) -> int:
    low, high = 0, len(ranks) - 1
    while low < high:
        middle = (low + high) // 2
        if close(ranks[middle]):
            high = middle
        else:
            low = middle + 1
    return ranks[low]
