"""Tensors as sums of outer products: composed, balanced, and checked for components that cancel."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from onnxlr.types import Array

# Components whose norms add up, in squares, to this many times the tensor's cancel each other.
_DEGENERATE = 100.0


@dataclass(frozen=True)
class Cp:
    """A sum of R outer products, the components, that approximates a tensor.

    Attributes
    ----------
    factors : tuple of ndarray of shape (n_i, R)
        One for each mode; the norm of a component is shared out equally among them.
    error : float
        Relative Frobenius error.
    growth : float
        Σ‖component‖² / ‖tensor‖², which a degenerate decomposition sends to infinity.
    """

    factors: tuple[Array, ...]
    error: float
    growth: float

    @property
    def degenerate(self) -> bool:
        """Whether the components cancel each other, so that rounding takes over."""
        return not is_stable(self.growth)


def is_stable(growth: float) -> bool:
    """Whether components whose squared norms add up to ``growth`` don't cancel each other."""
    return growth < _DEGENERATE


def exact_rank(shape: tuple[int, ...]) -> int:
    """A rank at which every tensor of a shape has an exact decomposition: all sides but one."""
    return int(np.prod(shape)) // max(shape)


def compose(factors: tuple[Array, ...]) -> Array:
    """The tensor of shape (n_1, …, n_k) that factors of shapes (n_i, R) stand for."""
    sizes = tuple(len(f) for f in factors)
    return np.asarray((factors[0] @ khatri_rao(factors[1:]).T).reshape(sizes))


def khatri_rao(factors: Sequence[Array]) -> Array:
    """The column-wise Kronecker product of factors, in which the last factor's rows run fastest."""
    return reduce(lambda a, b: (a[:, None] * b[None]).reshape(-1, a.shape[1]), factors)


def growth_of(factors: Sequence[Array]) -> float:
    """The sum of the components' squared norms."""
    return float(np.sum(reduce(np.multiply, (np.sum(f**2, axis=0) for f in factors))))


def component_norms(factors: Sequence[Array]) -> Array:
    """The norm of each component: an array of shape (R,)."""
    return reduce(np.multiply, (np.linalg.norm(f, axis=0) for f in factors))


def balance(factors: Sequence[Array]) -> list[Array]:
    """The same components, the norm of each shared out equally among the modes."""
    norms = [np.maximum(np.linalg.norm(f, axis=0), 1e-150) for f in factors]
    share = reduce(np.multiply, norms) ** (1 / len(factors))
    return [f * (share / n) for f, n in zip(factors, norms, strict=True)]
