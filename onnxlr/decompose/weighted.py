"""Factors fitted to what a layer does with its inputs: any chain, by alternating least squares.

For inputs with covariance C the error of W̃ in place of W is tr((W − W̃)·C·(W − W̃)ᵀ). A chain makes
W̃ a sum of products of its factors, linear in each: with the others held, each is a linear least
squares problem, so that the error never rises.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SWEEPS = 8
_STEPS = 12
_TOLERANCE = 1e-3  # relative change of the error at which a sweep counts as the last
_EPS = 1e-10  # of the largest eigenvalue: directions that the inputs don't have


@dataclass(frozen=True)
class Form:
    """How a weight is made of factors: an einsum, whose result is (outputs…, inputs…).

    Attributes
    ----------
    equation : str
        For example ``"rsp,tr->tsp"``: in the order of the factors.
    outputs : int
        How many letters of the result are outputs.
    """

    equation: str
    outputs: int = 1

    @property
    def terms(self) -> tuple[str, ...]:
        """The letters of each factor."""
        return tuple(self.equation.split("->")[0].split(","))

    @property
    def result(self) -> str:
        """The letters of the weight."""
        return self.equation.split("->")[1]

    def compose(self, factors: Sequence[Array]) -> Array:
        """The weight as a matrix of outputs × inputs."""
        whole = np.einsum(self.equation, *factors, optimize=True)
        return np.asarray(whole.reshape(math.prod(whole.shape[: self.outputs]), -1))


def weighted_fit(
    form: Form,
    factors: Sequence[Array],
    weight: Array,
    covariance: Array,
    sweeps: int = _SWEEPS,
    steps: int = _STEPS,
) -> tuple[list[Array], list[float]]:
    """Improve the factors of a weight for inputs of a covariance.

    Parameters
    ----------
    form : Form
    factors : sequence of ndarray
        Where to start from.
    weight : ndarray of shape (m, n)
    covariance : ndarray of shape (n, n)
    sweeps : int
        The most times that every factor is fitted in turn.
    steps : int
        Of conjugate gradients, for factors whose problem is too large to solve.

    Returns
    -------
    factors : list of ndarray
    errors : list of float
        Relative output error at the start and after each sweep; it never rises.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> W, X = rng.standard_normal((6, 8)), rng.standard_normal((8, 200)) * np.arange(1, 9)[:, None]
    >>> start = [np.linalg.svd(W)[2][:2], W @ np.linalg.svd(W)[2][:2].T]
    >>> _, errors = weighted_fit(Form("rn,mr->mn"), start, W, X @ X.T / 200)
    >>> bool(errors[-1] < errors[0])
    True
    """
    factors = list(factors)
    whole = float(np.sum((weight @ covariance) * weight))
    if whole <= 0:
        return factors, [0.0]

    def error() -> float:
        rest = weight - form.compose(factors)
        return math.sqrt(max(0.0, float(np.sum((rest @ covariance) * rest))) / whole)

    errors = [error()]
    for _ in range(sweeps):
        kept = list(factors)
        for k in reversed(range(len(factors))):
            factors[k] = _solve(form, factors, k, weight, covariance, steps)
        errors.append(error())
        if errors[-1] > errors[-2]:  # rounding, at the bottom
            factors, errors[-1] = kept, errors[-2]
            break
        if errors[-2] - errors[-1] <= _TOLERANCE * errors[-2]:
            break
    return factors, errors


def _solve(
    form: Form, factors: list[Array], k: int, weight: Array, covariance: Array, steps: int
) -> Array:
    """The k-th factor that fits best, the others held."""
    letters = form.terms[k]
    others = [t for i, t in enumerate(form.terms) if i != k]
    first = form.result[0]
    if form.outputs == 1 and letters[0] == first and not any(first in t for t in others):
        return _regress(form, factors, k, weight, covariance)
    return _descend(form, factors, k, weight, covariance, steps)


def _regress(form: Form, factors: list[Array], k: int, weight: Array, covariance: Array) -> Array:
    """The factor that meets the outputs: a regression on what the others make of the inputs."""
    shape = factors[k].shape
    rest = math.prod(shape[1:])
    identity = np.eye(rest).reshape(rest, *shape[1:])
    features = form.compose([*factors[:k], identity, *factors[k + 1 :]])  # (rest, n)
    weighted = features @ covariance
    values, vectors = scipy.linalg.eigh(weighted @ features.T)
    held = values > _EPS * max(float(values[-1]), np.finfo(np.float64).tiny)
    basis = vectors[:, held] / np.sqrt(values[held])
    # What the inputs don't have stays as it is: only the rest of the weight is regressed.
    residual = weight - factors[k].reshape(shape[0], rest) @ features
    step = ((residual @ weighted.T) @ basis) @ basis.T
    return np.asarray(factors[k] + step.reshape(shape))


def _descend(
    form: Form, factors: list[Array], k: int, weight: Array, covariance: Array, steps: int
) -> Array:
    """Some steps of conjugate gradients on the normal equations of one factor."""
    terms = form.terms
    others = [f for i, f in enumerate(factors) if i != k]
    back = ",".join([form.result, *(t for i, t in enumerate(terms) if i != k)]) + "->" + terms[k]
    sizes = dict(
        pair
        for term, factor in zip(terms, factors, strict=True)
        for pair in zip(term, factor.shape, strict=True)
    )
    result = tuple(sizes[letter] for letter in form.result)

    def forward(x: Array) -> Array:
        return form.compose([*factors[:k], x, *factors[k + 1 :]])

    def backward(rest: Array) -> Array:
        whole = (rest @ covariance).reshape(result)
        return np.asarray(np.einsum(back, whole, *others, optimize=True))

    x = factors[k].copy()
    residual = backward(weight - forward(x))
    direction = residual.copy()
    size = float(np.sum(residual**2))
    start = size
    for _ in range(steps):
        if size <= 1e-24 * start or size == 0.0:
            break
        moved = forward(direction)
        curvature = float(np.sum((moved @ covariance) * moved))
        if curvature <= 0:
            break
        length = size / curvature
        x += length * direction
        residual -= length * backward(moved)
        before, size = size, float(np.sum(residual**2))
        direction = residual + (size / before) * direction
    return x


def has_closed_form(form: Form) -> bool:
    """Whether a form is one bottleneck between all outputs and all inputs."""
    if len(form.terms) != 2 or form.outputs != 1:
        return False
    outer, inner = _ends(form)
    bottleneck = form.terms[outer].replace(form.result[0], "")
    rest = form.terms[inner].replace(bottleneck, "")
    return len(bottleneck) == 1 and rest == form.result[1:] and bottleneck not in form.result


def _ends(form: Form) -> tuple[int, int]:
    outer = next(i for i, term in enumerate(form.terms) if form.result[0] in term)
    return outer, 1 - outer


def closed_form(
    form: Form, shapes: Sequence[Array], weight: Array, covariance: Array
) -> list[Array]:
    """The best factors of all, for a form that ``has_closed_form``.

    With U the leading eigenvectors of W·C·Wᵀ they are U and Uᵀ·W, and what is lost is the sum of
    the other eigenvalues. No inverse is taken: a singular C is no problem.

    Parameters
    ----------
    form : Form
    shapes : sequence of ndarray
        Factors whose shapes count, not their values.
    weight : ndarray of shape (m, n)
    covariance : ndarray of shape (n, n)

    Returns
    -------
    list of ndarray

    Examples
    --------
    >>> W = np.diag([3.0, 2.0, 1.0])
    >>> shapes = [np.empty((3, 1)), np.empty((1, 3))]
    >>> U, V = closed_form(Form("mr,rn->mn"), shapes, W, np.diag([1, 9, 1]))
    >>> np.abs(U @ V).round(6).tolist()
    [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """
    outer, inner = _ends(form)
    out = form.result[0]
    bottleneck = form.terms[outer].replace(out, "")
    rank, m = shapes[outer].shape[form.terms[outer].index(bottleneck)], len(weight)
    kept = min(rank, m)  # no more than outputs: the rest stays empty
    _, vectors = scipy.linalg.eigh(
        weight @ covariance @ weight.T, subset_by_index=(m - kept, m - 1)
    )
    u = np.pad(vectors[:, ::-1], ((0, 0), (0, rank - kept)))
    v = u.T @ weight
    found = list(shapes)
    found[outer] = u if form.terms[outer][0] == out else u.T
    turned = v if form.terms[inner][0] == bottleneck else v.T
    found[inner] = turned.reshape(shapes[inner].shape)
    return found
