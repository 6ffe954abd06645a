"""Second moments of a layer's inputs, by which errors of its output are measured and minimised.

For inputs with second moments C the error of W̃ in place of W is tr((W − W̃)·C·(W − W̃)ᵀ). C is a
matrix where inputs have few elements. Where they have tens of thousands it is never built: sampled
rows X and a variance for each element serve, C = XᵀX/N + diag(d).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
import scipy.linalg

from onnxlr.decompose.form import Form
from onnxlr.types import Array

T = TypeVar("T")
Term = tuple[str, Array]  # a factor's letters and its values
Solver = Callable[[Array], Array]  # from right-hand sides (n, columns) to solutions

_EPS = 1e-10  # of the trace: directions that the inputs don't have
_FREE = "Z"  # a letter that no form uses


class Moments(Protocol):
    """What alternating least squares asks of the inputs' second moments C.

    The i-th factor of a form is one of those that make W̃; all methods take the factors of all.
    """

    def energy(self, weight: Array) -> float:
        """tr(W·C·Wᵀ) of a weight (m, n)."""

    def output_moments(self, weight: Array) -> Array:
        """W·C·Wᵀ of a weight (m, n)."""

    def loss(self, form: Form, factors: Sequence[Array], weight: Array) -> float:
        """tr((W − W̃)·C·(W − W̃)ᵀ)."""

    def regression(
        self, form: Form, factors: Sequence[Array], k: int, weight: Array
    ) -> tuple[Array, Array]:
        """F·C·Fᵀ and W·C·Fᵀ, where F is what the factors but the k-th make of the inputs."""

    def gradient(self, form: Form, factors: Sequence[Array], k: int, weight: Array) -> Array:
        """(W − W̃)·C, contracted with the factors but the k-th: of the k-th factor's shape."""

    def curve(self, form: Form, factors: Sequence[Array], k: int) -> tuple[Array, float]:
        """W̃·C, contracted likewise, and tr(W̃·C·W̃ᵀ)."""

    def average_solver(
        self, sizes: Mapping[str, int], inputs: str, inner: Sequence[Term], shared: str, right: str
    ) -> Solver:
        """A solver with the moments of what inner factors make of the inputs.

        Parameters
        ----------
        sizes : mapping of str to int
            The length that each letter stands for.
        inputs : str
            The letters of an input.
        inner : sequence of (str, ndarray)
            Letters and values of the inner factors.
        shared : str
            Those of the inputs' letters over which moments are averaged.
        right : str
            The letters of what the inner factors make of the inputs.
        """


class Covariance:
    """C as a matrix.

    Parameters
    ----------
    matrix : ndarray of shape (n, n)
    """

    def __init__(self, matrix: Array) -> None:
        self.matrix = matrix

    def energy(self, weight: Array) -> float:
        """See ``Moments``."""
        return float(np.sum((weight @ self.matrix) * weight))

    def output_moments(self, weight: Array) -> Array:
        """See ``Moments``."""
        return np.asarray(weight @ self.matrix @ weight.T)

    def loss(self, form: Form, factors: Sequence[Array], weight: Array) -> float:
        """See ``Moments``."""
        return self.energy(weight - form.compose(factors))

    def regression(
        self, form: Form, factors: Sequence[Array], k: int, weight: Array
    ) -> tuple[Array, Array]:
        """See ``Moments``; F itself is sparse, and never built."""
        inner, inputs = form.terms[k][1:], form.result[1:]
        others, terms = without(factors, k), ",".join(without(form.terms, k))
        sizes = form.sizes(factors)
        spread = tuple(sizes[letter] for letter in inputs)
        rest = math.prod(factors[k].shape[1:])
        weighted = np.einsum(  # F · C
            f"{terms},{inputs}{_FREE}->{inner}{_FREE}",
            *others,
            self.matrix.reshape(*spread, -1),
            optimize=True,
        ).reshape(rest, -1)
        gram = np.einsum(  # F · C · Fᵀ
            f"{terms},{_FREE}{inputs}->{inner}{_FREE}",
            *others,
            weighted.reshape(rest, *spread),
            optimize=True,
        ).reshape(rest, rest)
        return gram, weight @ weighted.T

    def gradient(self, form: Form, factors: Sequence[Array], k: int, weight: Array) -> Array:
        """See ``Moments``."""
        return contracted(form, factors, k, (weight - form.compose(factors)) @ self.matrix)

    def curve(self, form: Form, factors: Sequence[Array], k: int) -> tuple[Array, float]:
        """See ``Moments``."""
        made = form.compose(factors)
        weighted = made @ self.matrix
        return contracted(form, factors, k, weighted), float(np.sum(weighted * made))

    def average_solver(
        self, sizes: Mapping[str, int], inputs: str, inner: Sequence[Term], shared: str, right: str
    ) -> Solver:
        """See ``Moments``."""
        spread = tuple(sizes[letter] for letter in inputs)
        twin = "".join(letter if letter in shared else letter.upper() for letter in inputs)
        terms = [t for t, _ in inner]
        average = np.einsum(
            ",".join([*terms, f"{inputs}{twin}", *(t.upper() for t in terms)])
            + f"->{right}{right.upper()}",
            *(f for _, f in inner),
            self.matrix.reshape(*spread, *spread),
            *(f for _, f in inner),
            optimize=True,
        )
        n = math.prod(sizes[letter] for letter in right)
        return solver(average.reshape(n, n))


def solver(gram: Array) -> Solver:
    """A function that solves with a positive semidefinite matrix, with as small a ridge as works.

    It takes and returns right-hand sides of shape (n, columns) for a matrix of shape (n, n).
    """
    ridge = _EPS * float(np.trace(gram)) + np.finfo(np.float64).tiny
    ridged = gram.copy().T  # in the order that LAPACK overwrites; only one triangle is read
    np.fill_diagonal(ridged, gram.diagonal() + ridge)
    cholesky = scipy.linalg.cho_factor(ridged, lower=True, overwrite_a=True, check_finite=False)
    return lambda right: np.asarray(scipy.linalg.cho_solve(cholesky, right, check_finite=False))


def contracted(form: Form, factors: Sequence[Array], k: int, weight: Array) -> Array:
    """A matrix (m, n) contracted with all factors but the k-th, in that one's shape."""
    terms, sizes = form.terms, form.sizes(factors)
    back = ",".join([form.result, *without(terms, k)]) + "->" + terms[k]
    result = tuple(sizes[letter] for letter in form.result)
    return np.asarray(np.einsum(back, weight.reshape(result), *without(factors, k), optimize=True))


def without(items: Sequence[T], k: int) -> list[T]:
    """All items but the k-th."""
    return [item for i, item in enumerate(items) if i != k]
