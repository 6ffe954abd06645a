"""Factors fitted to what a layer does with its inputs: any chain, by alternating least squares.

For inputs with covariance C the error of W̃ in place of W is tr((W − W̃)·C·(W − W̃)ᵀ). A chain makes
W̃ a sum of products of its factors, linear in each: while the others stay, each is a linear least
squares problem, so that the error never rises.
"""

import math
from collections.abc import Sequence

import numpy as np

from onnxlr.decompose.form import Form, outer_and_inner
from onnxlr.decompose.moments import Covariance, Moments
from onnxlr.decompose.svd import top_eigenpairs
from onnxlr.decompose.weighted_factor import fit_factor
from onnxlr.types import Array

_SWEEPS = 8
_STEPS = 12
_MOMENTUM, _MOST_MOMENTUM = 0.25, 0.75  # gained by a sweep that went well, and at most
_TOLERANCE = 1e-3  # relative change of the error at which a sweep counts as the last


def weighted_fit(
    form: Form,
    factors: Sequence[Array],
    weight: Array,
    moments: Moments,
    sweeps: int = _SWEEPS,
    steps: int = _STEPS,
) -> tuple[list[Array], list[float]]:
    """Improve the factors of a weight for its inputs.

    Parameters
    ----------
    form : Form
    factors : sequence of ndarray
        The factors to start from, of the shapes that the form's terms name.
    weight : ndarray of shape (m, n)
    moments : Moments
        Second moments of the inputs.
    sweeps : int
        The most times that every factor is fitted in turn.
    steps : int
        The most steps of conjugate gradients, for factors whose problem is too large to solve.

    Returns
    -------
    factors : list of ndarray
        Factors of the same shapes.
    errors : list of float
        Relative output error at the start and after each sweep; it never rises.

    Notes
    -----
    A sweep that went well is followed by one that starts further on in its direction, as in
    Nesterov's method (1983).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> W, X = rng.standard_normal((6, 8)), rng.standard_normal((8, 200)) * np.arange(1, 9)[:, None]
    >>> start = [np.linalg.svd(W)[2][:2], W @ np.linalg.svd(W)[2][:2].T]
    >>> _, errors = weighted_fit(Form("rn,mr->mn"), start, W, Covariance(X @ X.T / 200))
    >>> bool(errors[-1] < errors[0])
    True
    """
    factors = list(factors)
    energy = moments.energy(weight)
    if energy <= 0:
        return factors, [0.0]

    def error_of(factors: Sequence[Array]) -> float:
        return math.sqrt(max(0.0, moments.loss(form, factors, weight)) / energy)

    errors = [error_of(factors)]
    before, momentum = factors, 0.0
    for _ in range(sweeps):
        start = factors
        if momentum:
            start = [f + momentum * (f - b) for f, b in zip(factors, before, strict=True)]
        trial = _sweep(form, start, weight, moments, steps)
        error = error_of(trial)
        if error > errors[-1] and momentum:  # too far: a plain sweep instead, which can't rise
            momentum = 0.0
            trial = _sweep(form, factors, weight, moments, steps)
            error = error_of(trial)
        if error > errors[-1]:  # rounding, at the bottom
            break
        before, factors = factors, trial
        momentum = min(_MOST_MOMENTUM, momentum + _MOMENTUM)
        errors.append(error)
        if errors[-2] - errors[-1] <= _TOLERANCE * errors[-2]:
            break
    return factors, errors


def _sweep(
    form: Form, factors: Sequence[Array], weight: Array, moments: Moments, steps: int
) -> list[Array]:
    """Every factor fitted in turn, the last one first."""
    factors = list(factors)
    for k in reversed(range(len(factors))):
        factors[k] = fit_factor(form, factors, k, weight, moments, steps)
    return factors


def closed_form(form: Form, shapes: Sequence[Array], weight: Array, leading: Array) -> list[Array]:
    """The best factors of all, for a form that ``has_closed_form``.

    With U the leading eigenvectors of W·C·Wᵀ they are U and Uᵀ·W, and what is lost is the sum of
    the other eigenvalues. No inverse is taken: a singular C is no problem.

    Parameters
    ----------
    form : Form
    shapes : sequence of ndarray
        Factors whose shapes count, not their values.
    weight : ndarray of shape (m, n)
    leading : ndarray of shape (m, count)
        U, with at least as many columns as the rank, or with all there are: see
        ``leading_outputs``.

    Returns
    -------
    list of ndarray
        Factors of these shapes.

    Examples
    --------
    >>> W = np.diag([3.0, 2.0, 1.0])
    >>> shapes = [np.empty((3, 1)), np.empty((1, 3))]
    >>> leading = leading_outputs(W, Covariance(np.diag([1.0, 9, 1])), 1)
    >>> U, V = closed_form(Form("mr,rn->mn"), shapes, W, leading)
    >>> np.abs(U @ V).round(6).tolist()
    [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """
    outer, inner = outer_and_inner(form)
    out = form.result[0]
    bottleneck = form.terms[outer].replace(out, "")
    rank = shapes[outer].shape[form.terms[outer].index(bottleneck)]
    u = leading[:, :rank]  # no more than outputs: the rest stays empty
    u = np.pad(u, ((0, 0), (0, rank - u.shape[1])))
    v = u.T @ weight
    factors = list(shapes)
    factors[outer] = u if form.terms[outer][0] == out else u.T
    turned = v if form.terms[inner][0] == bottleneck else v.T
    factors[inner] = turned.reshape(shapes[inner].shape)
    return factors


def leading_outputs(weight: Array, moments: Moments, count: int) -> Array:
    """The leading eigenvectors of W·C·Wᵀ, (m, count); fewer where there are fewer outputs."""
    if isinstance(moments, Covariance) and len(weight) > 2 * len(moments.matrix):
        root, square = _input_side(weight, moments)
        return np.asarray(np.linalg.qr(weight @ root @ leading_eigenvectors(square, count))[0])
    return leading_eigenvectors(moments.output_moments(weight), count)


def leading_eigenvectors(square: Array, count: int) -> Array:
    """The leading eigenvectors of a symmetric matrix, (m, count); all there are if fewer."""
    _, vectors = top_eigenpairs(square, min(count, len(square)))
    return np.asarray(vectors[:, ::-1])


def output_energies(weight: Array, moments: Moments) -> Array:
    """The eigenvalues of W·C·Wᵀ in descending order: what each direction of the output has."""
    if isinstance(moments, Covariance) and len(weight) > 2 * len(moments.matrix):
        square = _input_side(weight, moments)[1]
    else:
        square = moments.output_moments(weight)
    return np.asarray(np.maximum(np.linalg.eigvalsh(square)[::-1], 0.0))


def _input_side(weight: Array, covariance: Covariance) -> tuple[Array, Array]:
    """C½ and C½·Wᵀ·W·C½, whose eigenvalues are those of W·C·Wᵀ: of many outputs the small side."""
    values, vectors = np.linalg.eigh(covariance.matrix)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    made = weight @ root
    return root, made.T @ made
