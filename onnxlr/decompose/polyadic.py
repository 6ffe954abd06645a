"""Canonical polyadic decomposition that stays stable: a tensor as a sum of R outer products.

Several starts are tried and the best goes on; a decomposition whose components cancel each other
says so (``Cp.degenerate``).
"""

import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose.outer_products import Cp, exact_rank
from onnxlr.decompose.polyadic_descent import Descent
from onnxlr.decompose.polyadic_starts import (
    exact_decomposition,
    random_start,
    start_from_hosvd,
    start_from_pencil,
)
from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.types import Array

_EXACT_ENOUGH = 1e-6  # error of a decomposition from the eigenproblem that needs no other start


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
    the components' norms small (Phan et al. 2020, arXiv 2008.05441); the best start then goes on
    with a lighter one and in the end without, as long as it pays. Where components begin to cancel
    each other, the way ends at the last decomposition that is stable. From the rank at which any
    tensor has an exact decomposition on, that one is returned.

    Parameters
    ----------
    tensor : ndarray of shape (n_1, …, n_k)
        Three modes or more.
    rank : int
        The number R of components, 1 or more.
    starts : int
        How many starts are tried.
    seed : int
        Seed of the random starts.
    near : tuple of ndarray of shape (n_i, R), optional
        Factors of a tensor nearby. The descent goes on from them, briefly, and from nowhere else.
    thorough : bool
        Whether the best start goes on without the ridge; a sketch doesn't.

    Returns
    -------
    Cp
        Factors of shapes (n_i, R), their relative error and their growth.

    Raises
    ------
    ValueError
        If the rank is below 1 or the tensor has fewer than three modes.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a, b, c = (rng.standard_normal((n, 2)) for n in (6, 5, 4))
    >>> decomposition = cp(np.einsum("ir,jr,kr->ijk", a, b, c), 2)
    >>> decomposition.error < 1e-6, decomposition.degenerate
    (True, False)
    """
    if rank < 1 or tensor.ndim < 3:
        raise ValueError(f"no CP of rank {rank} of a tensor with shape {tensor.shape}")
    x = np.asarray(tensor, dtype=np.float64)
    scale = float(np.linalg.norm(x))
    if scale == 0.0:
        return Cp(tuple(np.zeros((n, rank)) for n in x.shape), 0.0, 0.0)
    if rank >= exact_rank(x.shape):
        return exact_decomposition(x, rank)
    rng = np.random.default_rng(seed)
    descent = Descent(x / scale)
    share = scale ** (1 / x.ndim)  # what a factor carries of the tensor's norm
    # Thousands of small products: handing each to a pool of threads costs far more than it saves.
    with one_blas_thread():
        if near is not None:
            return _scaled(descent.follow([f / share for f in near]), share)
        if (factors := start_from_pencil(x / scale, rank)) is not None:
            best = descent.polish(factors)
            if best.error < _EXACT_ENOUGH and not best.degenerate:
                return _scaled(best, share)
        sketches = []
        for number in range(starts):
            if number:
                start = random_start(x.shape, rank, rng)
            else:
                start = start_from_hosvd(x / scale, rank, rng)
            sketches.append(descent.begin(start))
        best = min(sketches, key=lambda c: (c.degenerate, c.error))
        if thorough:
            best = descent.finish(best)
    return _scaled(best, share)


def _scaled(decomposition: Cp, share: float) -> Cp:
    """The decomposition of a tensor of norm 1 as one of the tensor itself."""
    factors = tuple(f * share for f in decomposition.factors)
    return Cp(factors, decomposition.error, decomposition.growth)
