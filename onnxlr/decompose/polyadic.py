"""Canonical polyadic decomposition that stays stable: a tensor as a sum of R outer products.

Plain alternating least squares on convolution kernels degenerates: components grow without bound
and cancel each other (Phan et al. 2020, arXiv 2008.05441). Here a ridge that fades keeps them
small, several starts are tried, and what still degenerates is said to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxlr.decompose.svd import leading_vectors
from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.types import Array

# Components whose norms add up, in squares, to this many times the tensor's cancel each other.
_DEGENERATE = 100.0
# On squared norms, for a tensor of norm 1: small enough to cost nothing that shows (a large one
# kills components for good), large enough to keep components from growing against each other.
_RIDGE = 1e-4
_LIGHT_RIDGE = 1e-5
_START_SWEEPS = 60
_LAST_SWEEPS = 2000  # without a ridge, as long as it pays
_MOST_WORK = 2e10  # multiply-adds without a ridge; large tensors get fewer sweeps
_TOLERANCE = 1e-6  # relative change of the error at which a sweep counts as the last
_NEAR = 1e-4  # the same from a decomposition nearby
_NEARLY_EXACT = 0.02  # below this error it pays to go on with Newton steps, up to this
_EXACT = 1e-9
_EXACT_ENOUGH = 1e-6  # of a decomposition that needs no other beside it
_DEAD = 1e-6  # norm of a component, of a tensor of norm 1
_NEWTON_STEPS = 60
_SINGULAR = 1e-12  # of a Gramian's trace, well above what rounding may take from its eigenvalues
_GRADIENTS = 200  # conjugate gradients in a step
_SHORT = 16  # entries of a mode, beyond which it has a side in every product


@dataclass(frozen=True)
class Cp:
    """A sum of outer products.

    Attributes
    ----------
    factors : tuple of ndarray of shape (n_i, R)
        One a mode; the components' norms are shared out equally among them.
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
        return not self.growth < _DEGENERATE


def cp(
    tensor: NDArray[np.generic],
    rank: int,
    starts: int = 3,
    seed: int = 0,
    near: tuple[Array, ...] | None = None,
    *,
    thorough: bool = True,
) -> Cp:
    """Best of several starts of ridge-regularized alternating least squares.

    The first start is from the higher-order SVD, the others are random, all seeded. A ridge keeps
    the components' norms small; the best start then goes on with a lighter one and in the end
    without, as long as it pays. Where components begin to cancel each other, the way ends at the
    last decomposition that is stable. From the rank at which any tensor has an exact
    decomposition on, that one is given.

    Parameters
    ----------
    tensor : ndarray of shape (n_1, …, n_k)
        Three modes or more.
    rank : int
    starts : int
    seed : int
    near : tuple of ndarray of shape (n_i, R), optional
        Factors of a tensor nearby. The descent goes on from them, briefly, and from nowhere else.
    thorough : bool
        Whether the best start goes on without the ridge; a sketch doesn't.

    Raises
    ------
    ValueError
        If the rank is below 1 or the tensor has fewer than three modes.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a, b, c = (rng.standard_normal((n, 2)) for n in (6, 5, 4))
    >>> found = cp(np.einsum("ir,jr,kr->ijk", a, b, c), 2)
    >>> found.error < 1e-6, found.degenerate
    (True, False)
    """
    if rank < 1 or tensor.ndim < 3:
        raise ValueError(f"no CP of rank {rank} of a tensor with shape {tensor.shape}")
    x = np.asarray(tensor, dtype=np.float64)
    scale = float(np.linalg.norm(x))
    if scale == 0.0:
        return Cp(tuple(np.zeros((n, rank)) for n in x.shape), 0.0, 0.0)
    if rank >= exact_rank(x.shape):
        return _exact(x, rank)
    rng = np.random.default_rng(seed)
    problem = _Problem(x / scale)
    share = scale ** (1 / x.ndim)
    # Thousands of small products: handing each to a pool of threads costs far more than it saves.
    with one_blas_thread():
        if near is None and (solved := _from_pencil(x / scale, rank)) is not None:
            found = problem.solved(solved)
            if found.error < _EXACT_ENOUGH and not found.degenerate:
                return Cp(tuple(f * share for f in found.factors), found.error, found.growth)
        if near is not None:
            followed = problem.follow([f / share for f in near])
            return Cp(tuple(f * share for f in followed.factors), followed.error, followed.growth)
        begun = []
        for start in range(starts):
            first = _random(x.shape, rank, rng) if start else _from_hosvd(x / scale, rank, rng)
            begun.append(problem.begin(first))
        best = min(begun, key=lambda c: (c.degenerate, c.error))
        if thorough:
            best = problem.finish(best)
    return Cp(tuple(f * share for f in best.factors), best.error, best.growth)


def exact_rank(shape: tuple[int, ...]) -> int:
    """A rank at which every tensor of a shape has an exact decomposition: all sides but one."""
    return int(np.prod(shape)) // max(shape)


def compose(factors: tuple[Array, ...]) -> Array:
    """The tensor that factors stand for."""
    sizes = tuple(len(f) for f in factors)
    return np.asarray((factors[0] @ _khatri_rao(factors[1:]).T).reshape(sizes))


class _Problem:
    """Alternating least squares on one tensor of norm 1."""

    def __init__(self, x: Array) -> None:
        self._x = x
        self._modes = range(x.ndim)
        self._unfolded = [
            np.ascontiguousarray(np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1))
            for mode in self._modes
        ]

    def begin(self, factors: list[Array]) -> Cp:
        """A start, with a ridge that keeps components small."""
        return self._descend(factors, _RIDGE, _START_SWEEPS)

    def follow(self, factors: list[Array]) -> Cp:
        """From factors of a tensor nearby, with the lighter ridge.

        Components that have died get another chance: no sweep would bring them back from zero.
        """
        sizes = reduce(np.multiply, (np.linalg.norm(f, axis=0) for f in factors))
        dead = sizes < _DEAD
        if dead.any():
            rest = self._x - compose(tuple(f * ~dead for f in factors))
            fresh = _from_hosvd(rest, int(dead.sum()), np.random.default_rng(0))
            factors = [f.copy() for f in factors]
            for factor, columns in zip(factors, fresh, strict=True):
                factor[:, dead] = columns
        return self._descend(_balanced(factors), _LIGHT_RIDGE, _START_SWEEPS, _NEAR)

    def solved(self, factors: list[Array]) -> Cp:
        """From factors that are all but exact: small components would not outlive a ridge."""
        start = Cp(tuple(factors), self._loss(factors, 0.0), _growth(factors))
        return self._converge(start) if start.error < _NEARLY_EXACT else start

    def finish(self, start: Cp) -> Cp:
        """On with a lighter ridge, then without one, as long as it pays and stays stable."""
        work = 2 * self._x.size * start.factors[0].shape[1] * self._x.ndim
        sweeps = int(min(_LAST_SWEEPS, max(_START_SWEEPS, _MOST_WORK / work)))
        found = start
        for ridge in (_LIGHT_RIDGE, 0.0):
            found = self._descend(list(found.factors), ridge, sweeps)
            if found.error < _NEARLY_EXACT:
                return self._converge(found)
        return found

    def _converge(self, start: Cp) -> Cp:
        """Damped Gauss-Newton steps: quadratic where sweeps crawl, beside an exact decomposition.

        The products with the Gramian of the Jacobian need no Jacobian (Sorber, Van Barel & De
        Lathauwer 2013); conjugate gradients solve for the step.
        """
        best, damping = start, start.error**2
        for _ in range(_NEWTON_STEPS):
            step = self._newton_step(best.factors, damping)
            moved = tuple(f + s for f, s in zip(best.factors, step, strict=True))
            found = Cp(moved, self._loss(list(moved), 0.0), _growth(list(moved)))
            if found.error < best.error and not (found.degenerate and not best.degenerate):
                gained, best = 1 - found.error / best.error, found
                damping /= 10
                if best.error < _EXACT or gained < _TOLERANCE:
                    break
            else:
                damping *= 10
        return Cp(tuple(_balanced(list(best.factors))), best.error, best.growth)

    def _newton_step(self, factors: tuple[Array, ...], damping: float) -> list[Array]:
        """(JᵀJ + damping·I)⁻¹·Jᵀ·residual, by conjugate gradients with its diagonal blocks."""
        grams = [f.T @ f for f in factors]

        def others(*skipped: int) -> Array:
            kept = [g for m, g in enumerate(grams) if m not in skipped]
            return reduce(np.multiply, kept, np.ones_like(grams[0]))

        own = [others(n) for n in self._modes]
        pairs = {(n, m): others(n, m) for n in self._modes for m in self._modes if n != m}
        # Only to condition: where components outnumber the rank, the Gramians alone are singular.
        damped = [
            scipy.linalg.cho_factor(g + (damping + _SINGULAR * np.trace(g)) * np.eye(len(g)))
            for g in own
        ]

        def product(p: list[Array]) -> list[Array]:
            crossed = [v.T @ f for v, f in zip(p, factors, strict=True)]
            return [
                p[n] @ own[n]
                + damping * p[n]
                + factors[n] @ sum(pairs[n, m] * crossed[m] for m in self._modes if m != n)
                for n in self._modes
            ]

        def conditioned(p: list[Array]) -> list[Array]:
            return [scipy.linalg.cho_solve(d, v.T).T for d, v in zip(damped, p, strict=True)]

        rest = [self._against(factors, n) - factors[n] @ own[n] for n in self._modes]
        step = [np.zeros_like(f) for f in factors]
        direction = conditioned(rest)
        steepness = first = _inner(rest, direction)
        for _ in range(_GRADIENTS):
            applied = product(direction)
            curvature = _inner(direction, applied)
            if curvature <= 0.0:  # nothing but rounding is left
                break
            length = steepness / curvature
            step = [s + length * d for s, d in zip(step, direction, strict=True)]
            rest = [r - length * a for r, a in zip(rest, applied, strict=True)]
            towards = conditioned(rest)
            before, steepness = steepness, _inner(rest, towards)
            if steepness < 1e-12 * first:
                break
            direction = [
                t + steepness / before * d for t, d in zip(towards, direction, strict=True)
            ]
        return step

    def _descend(
        self, factors: list[Array], ridge: float, sweeps: int, tolerance: float = _TOLERANCE
    ) -> Cp:
        """Sweep until it pays no more, or until the next step would degenerate."""
        error = self._loss(factors, ridge)
        stable = _growth(factors) < _DEGENERATE
        for sweep in range(sweeps):
            previous, before = factors, error
            factors = self._swept(factors, ridge)
            error = self._loss(factors, ridge)
            if sweep % 3 == 2:
                # A step beyond, as long as the way was (Bro 1998): plain sweeps crawl in valleys.
                reach = (sweep + 1) ** (1 / self._x.ndim)
                beyond = [f + reach * (f - p) for f, p in zip(factors, previous, strict=True)]
                if (further := self._loss(beyond, ridge)) < error:
                    factors, error = beyond, further
            held = _growth(factors) < _DEGENERATE
            if stable and not held:
                factors = previous
                break
            stable = held
            if before - error < tolerance * max(error, 1e-12):
                break
        return Cp(tuple(factors), self._loss(factors, 0.0), _growth(factors))

    def _swept(self, factors: list[Array], ridge: float) -> list[Array]:
        """Each factor in turn, the others held: a linear problem."""
        factors = list(factors)
        for mode in self._modes:
            others = [factors[m] for m in self._modes if m != mode]
            gram = reduce(np.multiply, (f.T @ f for f in others))
            right = self._against(factors, mode)
            if ridge == 0.0:
                # The least damping, towards the last iterate: exact in the end, and never singular.
                least = 1e-13 * max(float(np.trace(gram)) / len(gram), 1e-300)
                right += least * factors[mode]
                gram.flat[:: len(gram) + 1] += least
            gram.flat[:: len(gram) + 1] += ridge
            factors[mode] = scipy.linalg.solve(gram, right.T, assume_a="pos").T
        return _balanced(factors)

    def _against(self, factors: Sequence[Array], mode: int) -> Array:
        """The tensor times every factor but a mode's, component by component: (n_mode, R).

        Kernel axes are short: for them the longest mode is contracted first, and the products of
        all the other factors, many times the tensor, are never built.
        """
        shape, longest = self._x.shape, int(np.argmax(self._x.shape))
        if mode == longest or shape[mode] > _SHORT:
            return self._unfolded[mode] @ _khatri_rao(
                [factors[m] for m in self._modes if m != mode]
            )
        axes = [m for m in self._modes if m != longest]
        left = self._unfolded[longest].T @ factors[longest]
        left = left.reshape(*(shape[m] for m in axes), -1)
        for m in [m for m in axes if m != mode]:
            left = np.einsum("i...r,ir->...r", np.moveaxis(left, axes.index(m), 0), factors[m])
            axes.remove(m)
        return left

    def _loss(self, factors: list[Array], ridge: float) -> float:
        error = float(np.linalg.norm(self._x - compose(tuple(factors))))
        if ridge == 0.0:
            return error
        return float(np.sqrt(error**2 + ridge * sum(float(np.sum(f**2)) for f in factors)))


def _growth(factors: list[Array]) -> float:
    return float(np.sum(reduce(np.multiply, (np.sum(f**2, axis=0) for f in factors))))


def _inner(a: list[Array], b: list[Array]) -> float:
    return sum(float(np.vdot(x, y)) for x, y in zip(a, b, strict=True))


def _balanced(factors: list[Array]) -> list[Array]:
    """Each component's norm shared out equally among the modes."""
    norms = [np.maximum(np.linalg.norm(f, axis=0), 1e-150) for f in factors]
    each = reduce(np.multiply, norms) ** (1 / len(factors))
    return [f * (each / n) for f, n in zip(factors, norms, strict=True)]


def _khatri_rao(factors: list[Array] | tuple[Array, ...]) -> Array:
    """Column-wise Kronecker product, the last factor's rows fastest."""
    return reduce(lambda a, b: (a[:, None] * b[None]).reshape(-1, a.shape[1]), factors)


def _from_hosvd(x: Array, rank: int, rng: np.random.Generator) -> list[Array]:
    factors = []
    for mode, size in enumerate(x.shape):
        matrix = np.moveaxis(x, mode, 0).reshape(size, -1)
        known = min(rank, size)
        vectors = leading_vectors(matrix, known)
        more = rng.standard_normal((size, rank - known)) / np.sqrt(size)
        factors.append(np.hstack([vectors, more]))
    return factors


def _from_pencil(x: Array, rank: int) -> list[Array] | None:
    """The components of a tensor that is all but of this rank, by one eigenproblem.

    Two mixtures of slices share their eigenvectors (Leurgans, Ross & Abel 1993). It takes two modes
    as long as the rank, and a tensor that their leading vectors span; None for any other.
    """
    second, first = (int(m) for m in np.argsort(x.shape, kind="stable")[-2:])
    if rank > x.shape[second]:
        return None
    moved = np.moveaxis(x, (first, second), (0, 1))
    flat = moved.reshape(*moved.shape[:2], -1)
    if flat.shape[2] < 2:
        return None  # a matrix, which the higher-order SVD decomposes
    u = leading_vectors(flat.reshape(len(flat), -1), rank)
    v = leading_vectors(flat.transpose(1, 0, 2).reshape(flat.shape[1], -1), rank)
    core = np.einsum("ar,abp,bs->prs", u, flat, v)
    if float(np.sum(x**2) - np.sum(core**2)) > _NEARLY_EXACT**2:
        return None
    mixtures = leading_vectors(core.reshape(len(core), -1), 2)
    top, next_ = np.tensordot(mixtures, core, (0, 0))
    vectors = np.real(scipy.linalg.eig(top, next_)[1])
    try:
        b = v @ np.linalg.inv(vectors).T
    except np.linalg.LinAlgError:
        return None
    a = u @ next_ @ vectors
    others = np.linalg.lstsq(_khatri_rao([a, b]), flat.reshape(-1, flat.shape[2]), rcond=None)[0]
    rest = [m for m in range(x.ndim) if m not in (first, second)]
    factors = [np.zeros((size, rank)) for size in x.shape]
    factors[first], factors[second] = a, b
    for r, column in enumerate(others):
        whole = column.reshape([x.shape[m] for m in rest])
        for axis, mode in enumerate(rest):
            line = np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)
            factors[mode][:, r] = leading_vectors(line, 1)[:, 0]
        size = whole
        for mode in rest:
            size = np.tensordot(factors[mode][:, r], size, (0, 0))
        factors[rest[0]][:, r] *= float(size)
    return _balanced(factors)


def _random(shape: tuple[int, ...], rank: int, rng: np.random.Generator) -> list[Array]:
    return [rng.standard_normal((size, rank)) / np.sqrt(size) for size in shape]


def _exact(x: Array, rank: int) -> Cp:
    """Every fibre along the longest mode is a component of its own."""
    longest = int(np.argmax(x.shape))
    others = [m for m in range(x.ndim) if m != longest]
    places = np.indices([x.shape[m] for m in others]).reshape(len(others), -1)
    factors = [np.zeros((size, rank)) for size in x.shape]
    count = places.shape[1]
    for mode, index in zip(others, places, strict=True):
        factors[mode][index, np.arange(count)] = 1.0
    factors[longest][:, :count] = np.moveaxis(x, longest, 0).reshape(x.shape[longest], -1)
    return Cp(tuple(factors), 0.0, 1.0)
