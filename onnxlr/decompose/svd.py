"""Singular values and truncated SVD of stacks of matrices, in double precision."""

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, eigsh

from onnxlr.types import Array

# The partial decomposition is for ranks this many times below the full one, of matrices that have
# at least so many rows and columns.
_FAR_BELOW = 4
_LARGE = 128
_TINY = np.finfo(np.float64).tiny
# Lanczos iterations are for so many times fewer eigenvectors than there are, of matrices with at
# least so many rows: for more of them LAPACK takes less time.
_FEW, _LANCZOS = 24, 512
# Vectors that look for what they left out, products with each, and what may be rounding.
_PROBES, _PROBING, _ABOVE = 4, 8, 1e-6
# Sine of the largest angle to the exact subspace that rounding may bring.
_ANGLE = 1e-8

# Elements of a matrix up to which LAPACK gets the whole stack in one call: a quarter of a million
# 3×3 slices take a second that way, and minutes one by one.
_SMALL = 256


def singular_values(stack: NDArray[np.generic]) -> Array:
    """Singular values of every matrix in a stack, in descending order.

    Parameters
    ----------
    stack : ndarray of shape (g, m, n)
        Any floating-point type; the arithmetic is in float64.

    Returns
    -------
    ndarray of shape (g, min(m, n))
        In float64.

    Examples
    --------
    >>> singular_values(np.diag([3.0, 4.0])[None]).tolist()
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

    For ranks far below the full one of a large matrix the leading eigenvectors of its Gram matrix
    serve, as long as the gap behind them stands clear of what squaring loses; otherwise LAPACK
    decomposes the whole matrix.

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
            matrix = np.array(stack[i], dtype=np.float64, order="F")
            u, s, vt = _partial_svd(matrix, rank) or _economy_svd(matrix)
            left[i], right[i] = u[:, :rank], s[:rank, None] * vt[:rank]
    left, signs = _signed(left)
    return left, right * signs.transpose(0, 2, 1)


def leading_vectors(matrix: Array, rank: int) -> Array:
    """Orthonormal leading left singular vectors, completed at will where there are too few.

    Parameters
    ----------
    matrix : ndarray of shape (m, n) or (g, m, n)
    rank : int
        1 to m, also beyond n.

    Returns
    -------
    ndarray of shape (m, rank) or (g, m, rank)
    """
    m, n = matrix.shape[-2:]
    if matrix.ndim == 3:
        if m > min(n, _LARGE):
            return np.stack([leading_vectors(one, rank) for one in matrix])
        tops = np.maximum(np.abs(matrix).max(axis=(1, 2), keepdims=True), _TINY)
        scaled = matrix / tops
        # Of small matrices all vectors take less time than a choice of them.
        vectors = np.linalg.eigh(scaled @ scaled.swapaxes(1, 2))[1][..., : -rank - 1 : -1]
        return np.asarray(_signed(vectors)[0])
    if m > n:
        columns: Array = truncated_svd(matrix[None], min(rank, n))[0][0]
        if rank <= n:
            return columns
        full = np.linalg.qr(np.hstack([columns, np.eye(m)]))[0][:, :rank]
        full[:, :n] = columns
        return np.asarray(full)
    # The Gram matrix is far smaller, and what its squaring loses lies below 1e-8 of the largest.
    scaled = matrix / max(float(np.abs(matrix).max(initial=0.0)), _TINY)
    _, vectors = top_eigenpairs(scaled @ scaled.T, rank)
    return np.asarray(_signed(vectors[:, ::-1])[0])


def top_eigenpairs(gram: Array, count: int) -> tuple[Array, Array]:
    """The largest eigenvalues of a positive semidefinite matrix, and their eigenvectors.

    Where few of many are wanted, Lanczos iterations with implicit restarts find them (Sorensen
    1992); they start at a fixed vector, so that the same matrix gives the same bits. What repeats
    exactly may hide from a single start: then, and where they don't converge, LAPACK decomposes.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        It may be overwritten.
    count : int
        1 to n.

    Returns
    -------
    values : ndarray of shape (count,)
        In ascending order.
    vectors : ndarray of shape (n, count)

    Examples
    --------
    >>> top_eigenpairs(np.diag([1.0, 3.0, 2.0]), 2)[0].tolist()
    [2.0, 3.0]
    """
    n = len(gram)
    if n >= _LANCZOS and count * _FEW <= n and (pairs := _lanczos(gram, count)) is not None:
        return pairs
    values, vectors = scipy.linalg.eigh(
        gram, subset_by_index=(n - count, n - 1), overwrite_a=True, check_finite=False
    )
    return values, vectors


def _lanczos(gram: Array, count: int) -> tuple[Array, Array] | None:
    """The largest eigenpairs by Lanczos iterations; None where they don't show all of them."""
    n = len(gram)
    rng = np.random.default_rng(0)
    try:
        values, vectors = eigsh(gram, count, which="LA", v0=rng.standard_normal(n))
    except ArpackError:
        return None
    order = np.argsort(values, kind="stable")
    values, vectors = values[order], vectors[:, order]
    # What is left of the matrix may have nothing above the smallest of them.
    block = rng.standard_normal((n, _PROBES))
    largest = 0.0
    for _ in range(_PROBING):
        block = np.linalg.qr(block - vectors @ (vectors.T @ block))[0]
        after = gram @ block
        largest = max(largest, float(np.linalg.norm(after, 2)))
        block = after
    return (values, vectors) if largest <= values[0] * (1 + _ABOVE) else None


def _signed(left: Array) -> tuple[Array, Array]:
    """Columns whose largest entry in magnitude is positive, and the signs that made them so."""
    largest = np.argmax(np.abs(left), axis=-2, keepdims=True)
    signs = np.where(np.take_along_axis(left, largest, axis=-2) < 0, -1.0, 1.0)
    return left * signs, signs


def _partial_svd(a: Array, rank: int) -> tuple[Array, Array, Array] | None:
    """The leading singular triplets of a matrix where they are few and well defined; else None."""
    m, n = a.shape
    smaller, top = min(m, n), float(np.abs(a).max(initial=0.0))
    if smaller < _LARGE or rank * _FAR_BELOW > smaller or top == 0.0:
        return None
    scaled = a / top
    gram = scaled @ scaled.T if m <= n else scaled.T @ scaled
    # One more than the rank, to see the gap: rounding turns the subspace by eps·σ₁² over it.
    values, vectors = top_eigenpairs(gram, rank + 1)
    gap = float(values[1] - values[0])
    if smaller * np.finfo(np.float64).eps * float(values[-1]) > _ANGLE * gap:
        return None
    basis = vectors[:, :0:-1]
    if m <= n:
        u, s, vt = _economy_svd(basis.T @ a)
        return basis @ u, s, vt
    u, s, vt = _economy_svd(a @ basis)
    return u, s, vt @ basis.T


def _economy_svd(a: Array) -> tuple[Array, Array, Array]:
    """All singular triplets of a matrix."""
    try:
        return scipy.linalg.svd(a, full_matrices=False, check_finite=False)
    except np.linalg.LinAlgError:
        # Divide and conquer fails to converge on rare matrices where QR iteration does not.
        return scipy.linalg.svd(a, full_matrices=False, check_finite=False, lapack_driver="gesvd")
