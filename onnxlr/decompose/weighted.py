"""Factors fitted to what a layer does with its inputs: any chain, by alternating least squares.

For inputs with covariance C the error of W̃ in place of W is tr((W − W̃)·C·(W − W̃)ᵀ). A chain makes
W̃ a sum of products of its factors, linear in each: with the others held, each is a linear least
squares problem, so that the error never rises.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnxlr.types import Array

_SWEEPS = 8
_STEPS = 12
_MOMENTUM, _MOST_MOMENTUM = 0.25, 0.75  # gained by a sweep that went well, and at most
_TOLERANCE = 1e-3  # relative change of the error at which a sweep counts as the last
_EPS = 1e-10  # of the trace: directions that the inputs don't have
_FREE = "Z"  # a letter that no form uses


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

    @property
    def mixes(self) -> bool:
        """Whether mixed outputs are of the same form: one factor alone has them."""
        return self.outputs == 1 and sum(self.result[0] in term for term in self.terms) == 1

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

    def error(factors: Sequence[Array]) -> float:
        rest = weight - form.compose(factors)
        return math.sqrt(max(0.0, float(np.sum((rest @ covariance) * rest))) / whole)

    errors = [error(factors)]
    before, momentum = factors, 0.0
    for _ in range(sweeps):
        start = factors
        if momentum:  # on in the direction of the last sweep, as Nesterov's method goes
            start = [f + momentum * (f - b) for f, b in zip(factors, before, strict=True)]
        found = _sweep(form, start, weight, covariance, steps)
        now = error(found)
        if now > errors[-1] and momentum:  # too far: a plain sweep instead, which can't rise
            momentum = 0.0
            found = _sweep(form, factors, weight, covariance, steps)
            now = error(found)
        if now > errors[-1]:  # rounding, at the bottom
            break
        before, factors = factors, found
        momentum = min(_MOST_MOMENTUM, momentum + _MOMENTUM)
        errors.append(now)
        if errors[-2] - errors[-1] <= _TOLERANCE * errors[-2]:
            break
    return factors, errors


def _sweep(
    form: Form, factors: Sequence[Array], weight: Array, covariance: Array, steps: int
) -> list[Array]:
    """Every factor fitted in turn, the last one first."""
    found = list(factors)
    for k in reversed(range(len(found))):
        found[k] = _solve(form, found, k, weight, covariance, steps)
    return found


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
    shape, term = factors[k].shape, form.terms[k]
    inner, inputs = term[1:], form.result[1:]
    others = [f for i, f in enumerate(factors) if i != k]
    terms = ",".join(t for i, t in enumerate(form.terms) if i != k)
    sizes = _sizes(form, factors)
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
    missed = weight @ weighted.T - current @ gram
    # What the inputs don't have stays as it is: the ridge leaves a singular problem solvable.
    return np.asarray(factors[k] + _solver(gram)(missed.T).T.reshape(shape))


def _solver(gram: Array) -> Callable[[Array], Array]:
    """Solves with a positive semidefinite matrix, and as much of a ridge as that takes."""
    n = len(gram)
    ridge = _EPS * float(np.trace(gram)) + np.finfo(np.float64).tiny
    held = scipy.linalg.cho_factor((gram + gram.T) / 2 + ridge * np.eye(n), check_finite=False)
    return lambda right: np.asarray(scipy.linalg.cho_solve(held, right, check_finite=False))


def _sizes(form: Form, factors: Sequence[Array]) -> dict[str, int]:
    """The length that each letter stands for."""
    return dict(
        pair
        for term, factor in zip(form.terms, factors, strict=True)
        for pair in zip(term, factor.shape, strict=True)
    )


def _descend(
    form: Form, factors: list[Array], k: int, weight: Array, covariance: Array, steps: int
) -> Array:
    """Some steps of preconditioned conjugate gradients on one factor's normal equations."""
    factors, weight = _narrowed(form, factors, k, weight)
    terms = form.terms
    others = [f for i, f in enumerate(factors) if i != k]
    back = ",".join([form.result, *(t for i, t in enumerate(terms) if i != k)]) + "->" + terms[k]
    sizes = _sizes(form, factors)
    result = tuple(sizes[letter] for letter in form.result)
    precondition = _preconditioner(form, factors, k, covariance)

    def forward(x: Array) -> Array:
        return form.compose([*factors[:k], x, *factors[k + 1 :]])

    def backward(weighted: Array) -> Array:
        return np.asarray(np.einsum(back, weighted.reshape(result), *others, optimize=True))

    x = factors[k].copy()
    residual = backward((weight - forward(x)) @ covariance)
    better = precondition(residual)
    direction = better.copy()
    size = float(np.sum(residual * better))
    start = size
    for _ in range(steps):
        if size <= 1e-24 * start or size <= 0.0:
            break
        moved = forward(direction)
        weighted = moved @ covariance
        curvature = float(np.sum(weighted * moved))
        if curvature <= 0:
            break
        length = size / curvature
        x += length * direction
        residual -= length * backward(weighted)
        better = precondition(residual)
        before, size = size, float(np.sum(residual * better))
        direction = better + (size / before) * direction
    return x


def _preconditioner(
    form: Form, factors: list[Array], k: int, covariance: Array
) -> Callable[[Array], Array]:
    """The inverse of a Kronecker product near a factor's normal equations.

    One side is the Gram matrix of the factors between it and the outputs; the other the covariance
    of what it is given, averaged over inputs that only the first side sees. Where that side sees
    none it is exact.
    """
    term, inputs = form.terms[k], form.result[form.outputs :]
    out = set(form.result[: form.outputs])
    others = [(t, f) for i, (t, f) in enumerate(zip(form.terms, factors, strict=True)) if i != k]
    after = _connected(out, [t for t, _ in others])
    outer = [pair for pair in others if pair[0] in after]
    inner = [pair for pair in others if pair[0] not in after]
    seen = set("".join(after))
    left = "".join(letter for letter in term if letter in seen)
    right = "".join(letter for letter in term if letter not in seen)
    if not left or not right or set(left) & set(form.result):
        return lambda residual: residual
    sizes = _sizes(form, factors)
    m, n = (math.prod(sizes[letter] for letter in side) for side in (left, right))
    rest = "".join(sorted(seen - set(left)))
    product = np.einsum(
        ",".join(t for t, _ in outer) + f"->{left}{rest}", *(f for _, f in outer), optimize=True
    ).reshape(m, -1)
    gram = product @ product.T
    spread = tuple(sizes[letter] for letter in inputs)
    twin = "".join(letter if letter in seen else letter.upper() for letter in inputs)
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
        solved = solve_right(solve_left(turned.reshape(m, n)).T).T
        return np.asarray(solved.reshape(turned.shape).transpose(back))

    return precondition


def _connected(letters: set[str], terms: Sequence[str]) -> list[str]:
    """The terms that share a letter with these, or with one that does."""
    found: list[str] = []
    while more := [t for t in terms if t not in found and letters & set(t)]:
        found += more
        letters = letters | set("".join(more))
    return found


def _narrowed(form: Form, factors: list[Array], k: int, weight: Array) -> tuple[list[Array], Array]:
    """The same problem in no more outputs than one of the other factors spans.

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
