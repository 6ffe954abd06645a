"""One factor of a chain fitted while the others stay: a regression, or conjugate gradients.

W̃ is linear in each factor, and the error is tr((W − W̃)·C·(W − W̃)ᵀ): a least squares problem. A
factor that alone has the outputs is solved for. Any other has too large a problem: preconditioned
conjugate gradients lower its error.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.linalg

from onnxlr.decompose.form import Form
from onnxlr.types import Array

_EPS = 1e-10  # of the trace: directions that the inputs don't have
_FREE = "Z"  # a letter that no form uses


def fit_factor(
    form: Form, factors: list[Array], k: int, weight: Array, covariance: Array, steps: int
) -> Array:
    """The k-th factor, fitted to the weight while the others stay.

    Parameters
    ----------
    form : Form
    factors : list of ndarray
    k : int
        Index of the factor.
    weight : ndarray of shape (m, n)
    covariance : ndarray of shape (n, n)
    steps : int
        The most steps of conjugate gradients, where they are needed.

    Returns
    -------
    ndarray
        Of the k-th factor's shape.
    """
    letters = form.terms[k]
    others = [t for i, t in enumerate(form.terms) if i != k]
    first = form.result[0]
    if form.outputs == 1 and letters[0] == first and not any(first in t for t in others):
        return _regress(form, factors, k, weight, covariance)
    return _descend(form, factors, k, weight, covariance, steps)


def _regress(form: Form, factors: list[Array], k: int, weight: Array, covariance: Array) -> Array:
    """The factor that has the outputs: a regression on what the others make of the inputs."""
    shape, term = factors[k].shape, form.terms[k]
    inner, inputs = term[1:], form.result[1:]
    others = [f for i, f in enumerate(factors) if i != k]
    terms = ",".join(t for i, t in enumerate(form.terms) if i != k)
    sizes = form.sizes(factors)
    spread = tuple(sizes[letter] for letter in inputs)
    rest = math.prod(shape[1:])
    # The features are what the others make of the inputs, (rest, n): sparse, and never built.
    weighted = np.einsum(  # features · C
        f"{terms},{inputs}{_FREE}->{inner}{_FREE}",
        *others,
        covariance.reshape(*spread, -1),
        optimize=True,
    ).reshape(rest, -1)
    gram = np.einsum(  # features · C · featuresᵀ
        f"{terms},{_FREE}{inputs}->{inner}{_FREE}",
        *others,
        weighted.reshape(rest, *spread),
        optimize=True,
    ).reshape(rest, rest)
    current = factors[k].reshape(shape[0], rest)
    residual = weight @ weighted.T - current @ gram
    # What the inputs don't have stays as it is: the ridge leaves a singular problem solvable.
    return np.asarray(factors[k] + _solver(gram)(residual.T).T.reshape(shape))


def _solver(gram: Array) -> Callable[[Array], Array]:
    """A function that solves with a positive semidefinite matrix, with as small a ridge as works.

    It takes and returns right-hand sides of shape (n, columns) for a matrix of shape (n, n).
    """
    n = len(gram)
    ridge = _EPS * float(np.trace(gram)) + np.finfo(np.float64).tiny
    cholesky = scipy.linalg.cho_factor((gram + gram.T) / 2 + ridge * np.eye(n), check_finite=False)
    return lambda right: np.asarray(scipy.linalg.cho_solve(cholesky, right, check_finite=False))


def _descend(
    form: Form, factors: list[Array], k: int, weight: Array, covariance: Array, steps: int
) -> Array:
    """Some steps of preconditioned conjugate gradients on one factor's normal equations."""
    factors, weight = _narrow(form, factors, k, weight)
    terms = form.terms
    others = [f for i, f in enumerate(factors) if i != k]
    back = ",".join([form.result, *(t for i, t in enumerate(terms) if i != k)]) + "->" + terms[k]
    sizes = form.sizes(factors)
    result = tuple(sizes[letter] for letter in form.result)
    precondition = _preconditioner(form, factors, k, covariance)

    def forward(x: Array) -> Array:
        return form.compose([*factors[:k], x, *factors[k + 1 :]])

    def backward(weighted: Array) -> Array:
        return np.asarray(np.einsum(back, weighted.reshape(result), *others, optimize=True))

    x = factors[k].copy()
    residual = backward((weight - forward(x)) @ covariance)
    gradient = precondition(residual)
    direction = gradient.copy()
    size = float(np.sum(residual * gradient))
    start = size
    for _ in range(steps):
        if size <= 1e-24 * start or size <= 0.0:
            break
        change = forward(direction)
        weighted = change @ covariance
        curvature = float(np.sum(weighted * change))
        if curvature <= 0:
            break
        length = size / curvature
        x += length * direction
        residual -= length * backward(weighted)
        gradient = precondition(residual)
        before, size = size, float(np.sum(residual * gradient))
        direction = gradient + (size / before) * direction
    return x


def _preconditioner(
    form: Form, factors: list[Array], k: int, covariance: Array
) -> Callable[[Array], Array]:
    """The inverse of a Kronecker product near a factor's normal equations.

    One side is the Gram matrix of the factors between it and the outputs; the other the covariance
    of its inputs, averaged over those that only the first side has. Where that side has none it is
    exact.
    """
    term, inputs = form.terms[k], form.result[form.outputs :]
    out = set(form.result[: form.outputs])
    others = [(t, f) for i, (t, f) in enumerate(zip(form.terms, factors, strict=True)) if i != k]
    after = _connected(out, [t for t, _ in others])
    outer = [pair for pair in others if pair[0] in after]
    inner = [pair for pair in others if pair[0] not in after]
    letters = set("".join(after))
    left = "".join(letter for letter in term if letter in letters)
    right = "".join(letter for letter in term if letter not in letters)
    if not left or not right or set(left) & set(form.result):
        return lambda residual: residual
    sizes = form.sizes(factors)
    m, n = (math.prod(sizes[letter] for letter in side) for side in (left, right))
    rest = "".join(sorted(letters - set(left)))
    product = np.einsum(
        ",".join(t for t, _ in outer) + f"->{left}{rest}", *(f for _, f in outer), optimize=True
    ).reshape(m, -1)
    gram = product @ product.T
    spread = tuple(sizes[letter] for letter in inputs)
    twin = "".join(letter if letter in letters else letter.upper() for letter in inputs)
    terms = [t for t, _ in inner]
    average = np.einsum(
        ",".join([*terms, f"{inputs}{twin}", *(t.upper() for t in terms)])
        + f"->{right}{right.upper()}",
        *(f for _, f in inner),
        covariance.reshape(*spread, *spread),
        *(f for _, f in inner),
        optimize=True,
    ).reshape(n, n)
    order = [term.index(letter) for letter in left + right]
    back = np.argsort(order)
    solve_left, solve_right = _solver(gram), _solver(average)

    def precondition(residual: Array) -> Array:
        turned = residual.transpose(order)
        solution = solve_right(solve_left(turned.reshape(m, n)).T).T
        return np.asarray(solution.reshape(turned.shape).transpose(back))

    return precondition


def _connected(letters: set[str], terms: Sequence[str]) -> list[str]:
    """The terms that share a letter with these, or with one that does."""
    group: list[str] = []
    while more := [t for t in terms if t not in group and letters & set(t)]:
        group += more
        letters = letters | set("".join(more))
    return group


def _narrow(form: Form, factors: list[Array], k: int, weight: Array) -> tuple[list[Array], Array]:
    """The factors and the weight of the same problem with as few outputs as one factor spans.

    Where W̃ = F·X with the k-th factor in X and F = Q·R, the part of W outside of Q's span is lost
    whatever X is: QᵀW and R take the places of W and F.
    """
    out = form.result[0]
    holders = [i for i, term in enumerate(form.terms) if out in term]
    if form.outputs != 1 or holders == [k] or len(holders) != 1:
        return factors, weight
    (i,) = holders
    axis = form.terms[i].index(out)
    tall = np.moveaxis(factors[i], axis, 0)
    if math.prod(tall.shape[1:]) >= len(tall):
        return factors, weight
    q, r = np.linalg.qr(tall.reshape(len(tall), -1))
    narrow = np.moveaxis(r.reshape(-1, *tall.shape[1:]), 0, axis)
    return [*factors[:i], narrow, *factors[i + 1 :]], q.T @ weight
