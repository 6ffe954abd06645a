"""One factor of a chain fitted while the others stay: a regression, or conjugate gradients.

W̃ is linear in each factor, and the error is tr((W − W̃)·C·(W − W̃)ᵀ): a least squares problem. A
factor that alone has the outputs is solved for. Any other has too large a problem: preconditioned
conjugate gradients lower its error.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnxlr.decompose.form import Form
from onnxlr.decompose.moments import Moments, solver, without
from onnxlr.types import Array


def fit_factor(
    form: Form, factors: list[Array], k: int, weight: Array, moments: Moments, steps: int
) -> Array:
    """The k-th factor, fitted to the weight while the others stay.

    Parameters
    ----------
    form : Form
    factors : list of ndarray
    k : int
        Index of the factor.
    weight : ndarray of shape (m, n)
    moments : Moments
        Of the inputs.
    steps : int
        The most steps of conjugate gradients, where they are needed.

    Returns
    -------
    ndarray
        Of the k-th factor's shape.
    """
    letters = form.terms[k]
    others = without(form.terms, k)
    first = form.result[0]
    if form.outputs == 1 and letters[0] == first and not any(first in t for t in others):
        return _regress(form, factors, k, weight, moments)
    return _descend(form, factors, k, weight, moments, steps)


def _regress(form: Form, factors: list[Array], k: int, weight: Array, moments: Moments) -> Array:
    """The factor that has the outputs: a regression on what the others make of the inputs."""
    shape = factors[k].shape
    gram, right = moments.regression(form, factors, k, weight)
    residual = right - factors[k].reshape(shape[0], -1) @ gram
    # What the inputs don't have stays as it is: the ridge leaves a singular problem solvable.
    return np.asarray(factors[k] + solver(gram)(residual.T).T.reshape(shape))


def _descend(
    form: Form, factors: list[Array], k: int, weight: Array, moments: Moments, steps: int
) -> Array:
    """Some steps of preconditioned conjugate gradients on one factor's normal equations."""
    factors, weight = _narrow(form, factors, k, weight)
    precondition = _preconditioner(form, factors, k, moments)
    x = factors[k].copy()
    residual = moments.gradient(form, factors, k, weight)
    gradient = precondition(residual)
    direction = gradient.copy()
    size = float(np.sum(residual * gradient))
    start = size
    for _ in range(steps):
        if size <= 1e-24 * start or size <= 0.0:
            break
        change, curvature = moments.curve(form, [*factors[:k], direction, *factors[k + 1 :]], k)
        if curvature <= 0:
            break
        length = size / curvature
        x += length * direction
        residual -= length * change
        gradient = precondition(residual)
        before, size = size, float(np.sum(residual * gradient))
        direction = gradient + (size / before) * direction
    return x


def _preconditioner(
    form: Form, factors: list[Array], k: int, moments: Moments
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
    solve_left = solver(gram)
    shared = "".join(letter for letter in inputs if letter in letters)
    solve_right = moments.average_solver(sizes, inputs, inner, shared, right)
    order = [term.index(letter) for letter in left + right]
    back = np.argsort(order)

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
