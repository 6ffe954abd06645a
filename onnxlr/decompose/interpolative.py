"""Interpolative decomposition of a width: which channels stay, and how they give the others.

For activations x of C channels it is x ≈ T·x_S: some of the channels, and a matrix that gives the
others (Cheng, Gimbutas, Martinsson & Rokhlin 2005). T is multiplied into the weights that read x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxlr.types import Array

_BLOCK = 16  # channels that go between two updates of the inverse
_POOL = 4  # blocks of channels among which those of the next block are looked for
_REFRESH = 0.75  # of the channels that an inverse was computed for, from which it is computed anew


@dataclass(frozen=True, eq=False)
class Reading:
    """What reads a width, and what it reads there.

    Attributes
    ----------
    moments : ndarray of shape (C, C)
        Second moments of the channels: about their mean where the reader has a bias that makes up
        for it.
    weight : ndarray of shape (m, C)
        What the reader multiplies them by.
    noise : float
        Rounding of the moments, as a share of each channel's: what of a channel is below it is no
        more than what the others make of it.
    """

    moments: Array
    weight: Array
    noise: float = 1e-12


@dataclass(frozen=True, eq=False)
class Elimination:
    """Channels in the order in which a width does best without them.

    Attributes
    ----------
    order : ndarray of shape (C,)
        Channels, the first to go first; the last one stays in any case.
    errors : ndarray of shape (C,)
        Entry i is the relative error of all that is read once the first i are gone.
    """

    order: NDArray[np.int64]
    errors: Array

    def kept(self, count: int) -> NDArray[np.int64]:
        """The channels that stay where so many do, in rising order."""
        return np.sort(self.order[len(self.order) - count :])


def elimination(readings: Sequence[Reading], heads: int = 1) -> Elimination:
    """The order in which channels go: the next is the one whose loss costs the readers least.

    Every reader is solved anew for what stays, by least squares to what it read before. So the cost
    of a channel is ‖m‖²/p, where m is its column of that solution and p its entry on the diagonal
    of the inverse of the moments (as in Optimal Brain Surgeon, Hassibi & Stork 1992).

    Parameters
    ----------
    readings : sequence of Reading
        Of the same C channels, one or more.
    heads : int
        Parts of as many channels, one behind the other: of each one goes before the next of any.

    Examples
    --------
    >>> x = np.array([[1.0, 2.0, 0.5], [2.0, 4.0, 1.0], [0.5, 1.0, 3.0]])
    >>> found = elimination([Reading(x, np.eye(3))])  # the second channel is twice the first
    >>> found.kept(2).tolist(), bool(found.errors[1] < 1e-5), bool(found.errors[2] > 0.1)
    ([1, 2], True, True)
    """
    terms = [_Term(item) for item in readings]
    total = sum(term.total for term in terms)
    count = readings[0].moments.shape[0]
    alive = np.arange(count)
    order: list[int] = []
    errors, lost, last = [0.0], 0.0, count + 1
    while len(alive) > heads:
        if len(alive) <= _REFRESH * last or last > count:
            last = len(alive)
            for term in terms:
                term.solve(alive)
        costs = np.asarray(sum(term.costs() for term in terms))
        block = min(_BLOCK, len(alive) - heads, max(1, len(alive) // 8))
        rounds = max(1, block // heads)
        part = alive * heads // count
        pool = _pool(costs, part, _POOL * rounds)
        gone, steps = _cheapest([term.part(pool) for term in terms], part[pool], rounds * heads)
        for step in steps:
            lost += step
            errors.append(float(np.sqrt(min(lost / total, 1.0))) if total > 0 else 0.0)
        order += alive[pool[gone]].tolist()
        rest = np.delete(np.arange(len(alive)), pool[gone])
        for term in terms:
            term.drop(pool[gone], rest)
        alive = alive[rest]
    return Elimination(np.array([*order, *alive], dtype=np.int64), np.array(errors))


class _Term:
    """The readers of one set of moments: their solution for the channels that are left."""

    def __init__(self, reading: Reading) -> None:
        scale = np.sqrt(np.maximum(np.diag(reading.moments), 0.0))
        safe = np.where(scale > 0, scale, 1.0)
        self._moments = reading.moments / safe / safe[:, None]
        self._noise = reading.noise
        weight = reading.weight * scale
        if weight.shape[0] > weight.shape[1]:  # a root of WᵀW loses nothing and has fewer rows
            weight = np.asarray(np.linalg.qr(weight, "r"), dtype=np.float64)
        self._weight = weight
        self.total = float(np.einsum("mi,ij,mj->", weight, self._moments, weight, optimize=True))
        self._inverse = self._solution = np.zeros((0, 0))

    def solve(self, alive: NDArray[np.int64]) -> None:
        """The inverse of the moments of these channels, and the solution, from scratch."""
        square = self._moments[np.ix_(alive, alive)]
        np.fill_diagonal(square, np.diag(square) + self._noise)
        try:
            triangle = scipy.linalg.cho_factor(square)
            self._inverse = scipy.linalg.cho_solve(triangle, np.eye(len(alive)))
        except np.linalg.LinAlgError:  # rounding has made it indefinite
            values, vectors = np.linalg.eigh(square)
            self._inverse = (vectors / np.maximum(values, self._noise)) @ vectors.T
        self._solution = (self._weight @ self._moments[:, alive]) @ self._inverse

    def costs(self) -> Array:
        """What the loss of each channel costs."""
        return np.asarray(_costs(self._solution, self._inverse))

    def part(self, pool: NDArray[np.int64]) -> tuple[Array, Array]:
        """The solution and the inverse, as far as they are about some channels."""
        return self._solution[:, pool].copy(), self._inverse[np.ix_(pool, pool)].copy()

    def drop(self, gone: NDArray[np.int64], rest: NDArray[np.int64]) -> None:
        """Solve anew without some channels."""
        corner = self._inverse[np.ix_(gone, gone)]
        moved = np.linalg.solve(corner, self._inverse[np.ix_(gone, rest)])
        self._solution = self._solution[:, rest] - self._solution[:, gone] @ moved
        self._inverse = (
            self._inverse[np.ix_(rest, rest)] - self._inverse[np.ix_(rest, gone)] @ moved
        )


def _costs(solution: Array, inverse: Array) -> Array:
    diagonal = np.maximum(np.diag(inverse), 1e-300)
    return np.asarray(np.square(solution).sum(axis=0) / diagonal)


def _pool(costs: Array, head: NDArray[np.int64], each: int) -> NDArray[np.int64]:
    """The places of so many channels of each head, those that cost least, in rising order."""
    order = np.argsort(costs, kind="stable")
    picked = [order[head[order] == i][:each] for i in np.unique(head)]
    return np.sort(np.concatenate(picked))


def _cheapest(
    parts: Sequence[tuple[Array, Array]], head: NDArray[np.int64], count: int
) -> tuple[list[int], list[float]]:
    """Some channels of a pool, each the cheapest once those before it are gone, and their costs.

    Of each head one goes before the next of any.
    """
    gone: list[int] = []
    steps: list[float] = []
    lost = np.zeros(int(head.max()) + 1, dtype=np.int64)
    fewest = np.unique(head)
    for _ in range(count):
        costs = np.asarray(sum(_costs(solution, inverse) for solution, inverse in parts))
        costs[lost[head] > lost[fewest].min()] = np.inf
        costs[gone] = np.inf
        j = int(np.argmin(costs))
        gone.append(j)
        lost[head[j]] += 1
        steps.append(float(costs[j]))
        for solution, inverse in parts:
            row = inverse[j] / max(inverse[j, j], 1e-300)
            solution -= np.outer(solution[:, j], row)
            inverse -= np.outer(inverse[:, j], row)
    return gone, steps


def refitted(weight: Array, cross: Array, moments: Array, prior: Array, ridge: float) -> Array:
    """The weight that makes of the kept channels what a weight made of all.

    It is (W·C + ε·P)·(M + ε)⁻¹, the least squares solution as far as the data tell, and the prior P
    elsewhere.

    Parameters
    ----------
    weight : ndarray of shape (m, n)
    cross : ndarray of shape (n, k)
        Second moments C between the inputs of the weight and those that are kept.
    moments : ndarray of shape (k, k)
        Second moments M of those that are kept.
    prior : ndarray of shape (m, k)
    ridge : float
        ε as a share of each input's second moment.

    Returns
    -------
    ndarray of shape (m, k)

    Examples
    --------
    >>> x = np.array([[1.0, 2.0], [2.0, 4.0]])  # the second is twice the first
    >>> refitted(np.ones((1, 2)), x[:, :1], x[:1, :1], np.ones((1, 1)), 1e-9).round(6).tolist()
    [[3.0]]
    """
    scale = np.sqrt(np.maximum(np.diag(moments), 0.0))
    floor = float(scale.max(initial=0.0)) * 1e-9 or 1.0
    scale = np.maximum(scale, floor)
    square = moments / scale / scale[:, None] + ridge * np.eye(len(scale))
    right = (weight @ cross) / scale + ridge * prior * scale
    try:
        solved = scipy.linalg.cho_solve(scipy.linalg.cho_factor(square), right.T).T
    except np.linalg.LinAlgError:  # rounding has made it indefinite
        solved = scipy.linalg.lstsq(square, right.T)[0].T
    return np.asarray(solved / scale)
