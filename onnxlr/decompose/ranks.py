"""Rank rules: what ``--rank`` may say, and the rank that follows from a spectrum."""

import re
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose.evbmf import evbmf
from onnxlr.decompose.svd import singular_values
from onnxlr.errors import UsageError
from onnxlr.types import Array

Kind = Literal["auto", "evbmf", "exact", "number", "fraction", "energy"]

_MOST_EVBMF = 512  # matrices of a stack whose EVBMF rank is computed
_GRAMMAR = (
    "auto, evbmf, exact, a number (32), a pair (16,32), a rank on p × q tiles (8,2,2), a fraction "
    "of the full rank (0.5) or energy:0.95"
)


@dataclass(frozen=True)
class RankRule:
    """A parsed ``--rank``: how each layer's rank follows.

    ``value`` is the fraction or the energy, ``numbers`` the rank, the pair of ranks, or the rank
    and the numbers of tiles; both are empty for the kinds that take none.
    """

    kind: Kind
    value: float = 0.0
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "number":
            return ",".join(map(str, self.numbers))
        if self.kind == "fraction":
            return f"{self.value}"
        return f"energy:{self.value}" if self.kind == "energy" else self.kind

    @property
    def needs_spectrum(self) -> bool:
        """Whether the rank depends on singular values, and not on shapes alone."""
        return self.kind not in ("number", "fraction")

    def of_full(self, full: int, component: int = 0) -> int:
        """The rank that a number or a fraction stands for, where the full rank is ``full``.

        ``component`` says which number of a pair counts.
        """
        if self.kind == "number":
            return min(self.numbers[component if len(self.numbers) > 1 else 0], full)
        return max(1, round(self.value * full))

    def select(self, values: Array, m: int, n: int, precision: float) -> int:
        """The rank by this rule of a stack of g matrices of m × n that share one rank.

        Parameters
        ----------
        values : ndarray of shape (g, min(m, n))
            Singular values, descending.
        m, n : int
            Shape of each matrix.
        precision : float
            Relative rounding error that the stored weights may carry, for ``exact``.

        Returns
        -------
        int
            The rank; 0 where nothing remains (noise for ``evbmf``, a weight of zeros).

        Raises
        ------
        ValueError
            If the rule is ``auto``: a search over the whole model decides that.
        """
        if not self.needs_spectrum:
            return self.of_full(min(m, n))
        if self.kind == "evbmf":
            # Of many small matrices the largest decide: noise in the others is below theirs.
            scaled = values / (values.max(initial=0.0) or 1.0)  # squares stay within the range
            order = np.argsort(-np.square(scaled).sum(axis=1), kind="stable")
            return max(evbmf(row, m, n).rank for row in values[order[:_MOST_EVBMF]])
        if self.kind == "energy":
            return rank_for_error(values, float(np.sqrt(max(0.0, 1.0 - self.value))))
        if self.kind == "exact":
            return rank_for_error(values, precision)
        raise ValueError("auto is decided over the whole model, not layer by layer")


AUTO = RankRule("auto")


def parse_rank(text: str) -> RankRule:
    """The rule that the value of ``--rank`` stands for.

    Raises
    ------
    UsageError
        If the text is no rank; the message gives the grammar.

    Examples
    --------
    >>> parse_rank("energy:0.95").value
    0.95
    >>> parse_rank("64").select(np.ones((1, 32)), 32, 48, 0.0)
    32
    """
    text = text.strip()
    if text in ("auto", "evbmf", "exact"):
        return RankRule(text)  # type: ignore[arg-type]
    if re.fullmatch(r"\d{1,9}(,\d{1,9}){0,2}", text) and all(map(int, text.split(","))):
        return RankRule("number", numbers=tuple(map(int, text.split(","))))
    head, _, tail = text.rpartition(":")
    try:
        value = float(tail)
    except ValueError:
        value = np.nan
    if head in ("", "energy") and 0.0 < value <= 1.0 and (head or "." in tail):
        return RankRule("energy" if head else "fraction", value)
    raise UsageError(f"--rank {text!r} is not a rank: give {_GRAMMAR}")


def tail_error(values: Array) -> Array:
    """Relative Frobenius error of truncation at every rank (Eckart-Young).

    Parameters
    ----------
    values : ndarray of shape (g, L)
        Singular values of a stack of g matrices that are truncated at the same rank.

    Returns
    -------
    ndarray of shape (L + 1,)
        Entry r is ‖W − W_r‖ / ‖W‖ over the whole stack; 1 at rank 0 and 0 at rank L. All zeros
        for a weight of zeros.

    Examples
    --------
    >>> tail_error(np.array([[4.0, 3.0]])).tolist()
    [1.0, 0.6, 0.0]
    """
    top = float(values.max(initial=0.0))
    if top == 0.0:
        return np.zeros(values.shape[1] + 1)
    # Divided first, so that neither 1e-200 nor 1e200 leaves the range when squared.
    energy = ((values / top) ** 2).sum(axis=0)
    tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return np.asarray(np.sqrt(tail / tail[0]))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of a stack of g unfoldings, which decide one component of a rank.

    Attributes
    ----------
    values : ndarray of shape (g, L)
        Singular values of each matrix, L = min(m, n) of them, descending.
    m, n : int
        Shape of each of the g matrices.
    errors : ndarray of shape (L + 1,)
        Relative error of truncation at every rank.
    """

    values: Array
    m: int
    n: int
    errors: Array


def spectrum_of(stack: NDArray[np.generic]) -> Spectrum:
    """The spectrum of a stack of matrices of shape (g, m, n)."""
    return spectrum_from(singular_values(stack), stack.shape[1], stack.shape[2])


def spectrum_from(values: Array, m: int, n: int) -> Spectrum:
    """The spectrum of g matrices of m × n, by their singular values of shape (g, L)."""
    return Spectrum(values, m, n, tail_error(values))


def rank_for_error(values: Array, error: float) -> int:
    """The smallest rank whose truncation error is at most ``error``; values of shape (g, L).

    Examples
    --------
    >>> rank_for_error(np.array([[4.0, 3.0]]), 0.6)
    1
    """
    # The slack covers the rounding of the cumulative sums: an error of 0.6 meets a limit of 0.6.
    return int(np.argmax(tail_error(values) <= error * (1 + 1e-12)))


def round_up(rank: int, limit: int) -> int:
    """The rank on the hardware's grid at or above this one, as long as the limit allows it.

    Kernels work in blocks of 16 channels (8 and 4 in narrow layers): the ranks up to the next
    multiple are nearly free, and a rank just above one costs nearly the next.
    """
    step = 16 if limit >= 48 else 8 if limit >= 16 else 4 if limit >= 8 else 1
    rounded = -(-rank // step) * step
    return rounded if rounded <= limit else rank


def storage_precision(dtype: np.dtype[np.generic]) -> float:
    """Relative rounding error that weights of a type may carry, for the numerical rank.

    Weights are stored in ``dtype``. As a rule they were computed in float32 at best, as a product
    of factors in a training framework: half an ulp of storage and a few of arithmetic.
    """
    stored = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
    arithmetic = min(stored, float(np.finfo(np.float32).eps))
    return stored + 16 * arithmetic
