"""The iterations of a polyadic decomposition: alternating least squares, then Gauss-Newton steps.

Plain alternating least squares on convolution kernels degenerates: components grow without bound
and cancel each other (Phan et al. 2020, arXiv 2008.05441). Here a ridge that fades keeps them
small, and a descent ends at its last stable decomposition.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import scipy.linalg

from onnxlr.decompose.outer_products import (
    Cp,
    balance,
    component_norms,
    compose,
    growth_of,
    is_stable,
    khatri_rao,
)
from onnxlr.decompose.polyadic_starts import NEARLY_EXACT, start_from_hosvd
from onnxlr.types import Array

# On squared norms, for a tensor of norm 1: small enough to cost nothing that shows (a large one
# kills components for good), large enough to keep components from growing against each other.
_RIDGE = 1e-4
_LIGHT_RIDGE = 1e-5
_START_SWEEPS = 60
_LAST_SWEEPS = 2000  # without a ridge, as long as it pays
_MOST_WORK = 2e10  # multiply-adds without a ridge; large tensors get fewer sweeps
_TOLERANCE = 1e-6  # relative change of the error at which a sweep counts as the last
_NEIGHBOUR_TOLERANCE = 1e-4  # the same for a descent from the factors of a tensor nearby
_EXACT = 1e-9  # error at which Newton steps end
_DEAD = 1e-6  # norm of a component that no sweep brings back, for a tensor of norm 1
_NEWTON_STEPS = 60
_SINGULAR = 1e-12  # of a Gramian's trace, well above what rounding may take from its eigenvalues
_GRADIENTS = 200  # conjugate gradients in a step
_SHORT = 16  # entries of a mode, beyond which it has a side in every product


class Descent:
    """Alternating least squares on one tensor of norm 1.

    Parameters
    ----------
    x : ndarray of shape (n_1, …, n_k)
    """

    def __init__(self, x: Array) -> None:
        self._x = x
        self._modes = range(x.ndim)
        self._unfoldings = [
            np.ascontiguousarray(np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1))
            for mode in self._modes
        ]

    def begin(self, factors: list[Array]) -> Cp:
        """Descend from a start, with a ridge that keeps components small."""
        return self._descend(factors, _RIDGE, _START_SWEEPS)

    def follow(self, factors: list[Array]) -> Cp:
        """Descend from the factors of a tensor nearby, with the lighter ridge.

        Components that have died get another chance: no sweep would bring them back from zero.
        """
        dead = component_norms(factors) < _DEAD
        if dead.any():
            rest = self._x - compose(tuple(f * ~dead for f in factors))
            fresh = start_from_hosvd(rest, int(dead.sum()), np.random.default_rng(0))
            factors = [f.copy() for f in factors]
            for factor, columns in zip(factors, fresh, strict=True):
                factor[:, dead] = columns
        return self._descend(balance(factors), _LIGHT_RIDGE, _START_SWEEPS, _NEIGHBOUR_TOLERANCE)

    def polish(self, factors: list[Array]) -> Cp:
        """Descend from factors that are all but exact, without a ridge: it would end small ones."""
        start = Cp(tuple(factors), self._loss(factors, 0.0), growth_of(factors))
        return self._converge(start) if start.error < NEARLY_EXACT else start

    def finish(self, start: Cp) -> Cp:
        """Go on with a lighter ridge, then without one, as long as it pays and stays stable."""
        work = 2 * self._x.size * start.factors[0].shape[1] * self._x.ndim
        sweeps = int(min(_LAST_SWEEPS, max(_START_SWEEPS, _MOST_WORK / work)))
        best = start
        for ridge in (_LIGHT_RIDGE, 0.0):
            best = self._descend(list(best.factors), ridge, sweeps)
            if best.error < NEARLY_EXACT:
                return self._converge(best)
        return best

    def _converge(self, start: Cp) -> Cp:
        """Damped Gauss-Newton steps: quadratic where sweeps crawl, beside an exact decomposition.

        The products with the Gramian of the Jacobian need no Jacobian (Sorber, Van Barel & De
        Lathauwer 2013); conjugate gradients solve for the step.
        """
        best, damping = start, start.error**2
        for _ in range(_NEWTON_STEPS):
            step = self._newton_step(best.factors, damping)
            factors = tuple(f + s for f, s in zip(best.factors, step, strict=True))
            trial = Cp(factors, self._loss(list(factors), 0.0), growth_of(factors))
            if trial.error < best.error and not (trial.degenerate and not best.degenerate):
                gain, best = 1 - trial.error / best.error, trial
                damping /= 10
                if best.error < _EXACT or gain < _TOLERANCE:
                    break
            else:
                damping *= 10
        return Cp(tuple(balance(best.factors)), best.error, best.growth)

    def _newton_step(self, factors: tuple[Array, ...], damping: float) -> list[Array]:
        """(JᵀJ + damping·I)⁻¹·Jᵀ·residual, by conjugate gradients with its diagonal blocks."""
        grams = [f.T @ f for f in factors]

        def others(*modes: int) -> Array:
            rest = [g for m, g in enumerate(grams) if m not in modes]
            return reduce(np.multiply, rest, np.ones_like(grams[0]))

        blocks = [others(n) for n in self._modes]
        pairs = {(n, m): others(n, m) for n in self._modes for m in self._modes if n != m}
        # Only to condition: where components outnumber the rank, the Gramians alone are singular.
        inverses = [
            scipy.linalg.cho_factor(g + (damping + _SINGULAR * np.trace(g)) * np.eye(len(g)))
            for g in blocks
        ]

        def product(p: list[Array]) -> list[Array]:
            crossed = [v.T @ f for v, f in zip(p, factors, strict=True)]
            return [
                p[n] @ blocks[n]
                + damping * p[n]
                + factors[n] @ sum(pairs[n, m] * crossed[m] for m in self._modes if m != n)
                for n in self._modes
            ]

        def conditioned(p: list[Array]) -> list[Array]:
            return [scipy.linalg.cho_solve(i, v.T).T for i, v in zip(inverses, p, strict=True)]

        residual = [self._contract(factors, n) - factors[n] @ blocks[n] for n in self._modes]
        step = [np.zeros_like(f) for f in factors]
        direction = conditioned(residual)
        steepness = first = _inner(residual, direction)
        for _ in range(_GRADIENTS):
            image = product(direction)
            curvature = _inner(direction, image)
            if curvature <= 0.0:  # nothing but rounding is left
                break
            length = steepness / curvature
            step = [s + length * d for s, d in zip(step, direction, strict=True)]
            residual = [r - length * i for r, i in zip(residual, image, strict=True)]
            gradient = conditioned(residual)
            before, steepness = steepness, _inner(residual, gradient)
            if steepness < 1e-12 * first:
                break
            direction = [
                g + steepness / before * d for g, d in zip(gradient, direction, strict=True)
            ]
        return step

    def _descend(
        self, factors: list[Array], ridge: float, sweeps: int, tolerance: float = _TOLERANCE
    ) -> Cp:
        """Sweep until it pays no more, or until the next step would degenerate."""
        error = self._loss(factors, ridge)
        was_stable = is_stable(growth_of(factors))
        for number in range(sweeps):
            previous, before = factors, error
            factors = self._sweep(factors, ridge)
            error = self._loss(factors, ridge)
            if number % 3 == 2:
                # A step beyond, as long as the way was (Bro 1998): plain sweeps crawl in valleys.
                reach = (number + 1) ** (1 / self._x.ndim)
                beyond = [f + reach * (f - p) for f, p in zip(factors, previous, strict=True)]
                if (further := self._loss(beyond, ridge)) < error:
                    factors, error = beyond, further
            stable = is_stable(growth_of(factors))
            if was_stable and not stable:
                factors = previous
                break
            was_stable = stable
            if before - error < tolerance * max(error, 1e-12):
                break
        return Cp(tuple(factors), self._loss(factors, 0.0), growth_of(factors))

    def _sweep(self, factors: list[Array], ridge: float) -> list[Array]:
        """Fit each factor in turn while the others stay: a linear problem."""
        factors = list(factors)
        for mode in self._modes:
            others = [factors[m] for m in self._modes if m != mode]
            gram = reduce(np.multiply, (f.T @ f for f in others))
            right = self._contract(factors, mode)
            if ridge == 0.0:
                # The least damping, towards the last iterate: exact in the end, and never singular.
                least = 1e-13 * max(float(np.trace(gram)) / len(gram), 1e-300)
                right += least * factors[mode]
                gram.flat[:: len(gram) + 1] += least
            gram.flat[:: len(gram) + 1] += ridge
            factors[mode] = scipy.linalg.solve(gram, right.T, assume_a="pos").T
        return balance(factors)

    def _contract(self, factors: Sequence[Array], mode: int) -> Array:
        """The tensor times every factor but a mode's, component by component: (n_mode, R).

        Kernel axes are short: for them the longest mode is contracted first, and the products of
        all the other factors, many times the tensor, are never built.
        """
        shape, longest = self._x.shape, int(np.argmax(self._x.shape))
        if mode == longest or shape[mode] > _SHORT:
            return self._unfoldings[mode] @ khatri_rao(
                [factors[m] for m in self._modes if m != mode]
            )
        axes = [m for m in self._modes if m != longest]
        left = self._unfoldings[longest].T @ factors[longest]
        left = left.reshape(*(shape[m] for m in axes), -1)
        for m in [m for m in axes if m != mode]:
            left = np.einsum("i...r,ir->...r", np.moveaxis(left, axes.index(m), 0), factors[m])
            axes.remove(m)
        return left

    def _loss(self, factors: list[Array], ridge: float) -> float:
        """The error of a decomposition, with a ridge the root of its square and the penalty."""
        error = float(np.linalg.norm(self._x - compose(tuple(factors))))
        if ridge == 0.0:
            return error
        return float(np.sqrt(error**2 + ridge * sum(float(np.sum(f**2)) for f in factors)))


def _inner(a: list[Array], b: list[Array]) -> float:
    """The inner product of two lists of arrays of the same shapes."""
    return sum(float(np.vdot(x, y)) for x, y in zip(a, b, strict=True))
