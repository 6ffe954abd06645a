"""Singular values and truncated SVD of stacks of matrices, in double precision."""

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Elements below which a stack is handed to LAPACK in one call: a quarter of a million 3×3 slices
# take a second so, and minutes one by one.
_SMALL = 256


def spectrum(stack: NDArray[np.generic]) -> Array:
    """Singular values of every matrix in a stack, in descending order.

    Parameters
    ----------
    stack : ndarray of shape (g, m, n)
        Any floating-point type; the arithmetic is in float64.

    Returns
    -------
    ndarray of shape (g, min(m, n))

    Examples
    --------
    >>> spectrum(np.diag([3.0, 4.0])[None]).tolist()
    [[4.0, 3.0]]
    """
    g, m, n = stack.shape
    if m * n <= _SMALL:
        return np.asarray(np.linalg.svd(stack.astype(np.float64), compute_uv=False))
    values = np.empty((g, min(m, n)))
    for i in range(g):
        # One float64 copy, which LAPACK may overwrite: peak memory is what `inspect` promises.
        copy = np.array(stack[i], dtype=np.float64, order="F")
        values[i] = scipy.linalg.svdvals(copy, overwrite_a=True, check_finite=False)
    return values


def truncated_svd(stack: NDArray[np.generic], rank: int) -> tuple[Array, Array]:
    """Best rank-``rank`` approximation ``U @ V`` of every matrix in a stack (Eckart-Young).

    ``U`` has orthonormal columns and ``V = Uᵀ W`` carries the scale, so that ``c * W`` gives the
    same ``U`` and ``c * V``. The sign of each component is fixed (the entry of ``U`` that is
    largest in magnitude is positive): LAPACK leaves it open, and files must be reproducible.
    Factors nest: the first r columns of a larger rank are the factors of rank r.

    Parameters
    ----------
    stack : ndarray of shape (g, m, n)
    rank : int
        1 to min(m, n).

    Returns
    -------
    U : ndarray of shape (g, m, rank)
    V : ndarray of shape (g, rank, n)

    Raises
    ------
    ValueError
        If the rank is outside 1 to min(m, n).

    Examples
    --------
    >>> W = np.outer([1.0, 2.0], [3.0, 0.0, 4.0])[None]
    >>> U, V = truncated_svd(W, 1)
    >>> bool(np.allclose(U @ V, W))
    True
    """
    g, m, n = stack.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} is outside 1 to {min(m, n)} for {m}×{n} matrices")
    left = np.empty((g, m, rank))
    right = np.empty((g, rank, n))
    if m * n <= _SMALL:
        u, s, vt = np.linalg.svd(stack.astype(np.float64), full_matrices=False)
        left[:], right[:] = u[..., :rank], s[:, :rank, None] * vt[:, :rank]
    else:
        for i in range(g):
            u, s, vt = _economy_svd(np.array(stack[i], dtype=np.float64, order="F"))
            left[i], right[i] = u[:, :rank], s[:rank, None] * vt[:rank]
    largest = np.argmax(np.abs(left), axis=1)[:, None]
    signs = np.where(np.take_along_axis(left, largest, axis=1) < 0, -1.0, 1.0)
    return left * signs, right * signs.transpose(0, 2, 1)


def _economy_svd(a: Array) -> tuple[Array, Array, Array]:
    try:
        return scipy.linalg.svd(a, full_matrices=False, check_finite=False)
    except np.linalg.LinAlgError:
        # Divide and conquer fails to converge on rare matrices where QR iteration does not.
        return scipy.linalg.svd(a, full_matrices=False, check_finite=False, lapack_driver="gesvd")
