"""Matrices cut into equal tiles, and the truncated SVD of each tile."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose.svd import truncated_svd
from onnxlr.types import Array

T = TypeVar("T", bound=np.generic)


def cut_tiles(stack: NDArray[T], rows: int, columns: int) -> NDArray[T]:
    """Cut every matrix of a stack into rows × columns tiles.

    Parameters
    ----------
    stack : ndarray of shape (g, m, n)
    rows, columns : int
        Numbers of tiles down and across; they divide m and n.

    Returns
    -------
    ndarray of shape (g, rows, columns, m / rows, n / columns)

    Raises
    ------
    ValueError
        If they don't divide m and n.

    Examples
    --------
    >>> cut_tiles(np.arange(8).reshape(1, 2, 4), 1, 2)[0, 0].tolist()
    [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    """
    g, m, n = stack.shape
    if m % rows or n % columns:
        raise ValueError(f"{rows}×{columns} tiles don't divide a {m}×{n} matrix")
    return stack.reshape(g, rows, m // rows, columns, n // columns).transpose(0, 1, 3, 2, 4)


def join_tiles(tiles: NDArray[T]) -> NDArray[T]:
    """Tiles of shape (g, rows, columns, a, b) as matrices (g, rows · a, columns · b).

    It undoes ``cut_tiles``.

    Examples
    --------
    >>> W = np.arange(24.0).reshape(1, 4, 6)
    >>> bool(np.array_equal(join_tiles(cut_tiles(W, 2, 3)), W))
    True
    """
    g, rows, columns, a, b = tiles.shape
    return tiles.transpose(0, 1, 3, 2, 4).reshape(g, rows * a, columns * b)


def tiled_svd(
    stack: NDArray[np.generic], rank: int, rows: int, columns: int
) -> tuple[Array, Array]:
    """Truncated SVD of every tile (Lee et al. 2019, arXiv 1905.10145).

    Parameters
    ----------
    stack : ndarray of shape (g, m, n)
    rank : int
        Rank of each tile, 1 to min(m / rows, n / columns).
    rows, columns : int
        Numbers of tiles down and across.

    Returns
    -------
    U : ndarray of shape (g, rows, columns, m / rows, rank)
    V : ndarray of shape (g, rows, columns, rank, n / columns)

    Raises
    ------
    ValueError
        If the tiles don't divide the matrix, or the rank is above that of a tile.

    Examples
    --------
    >>> W = np.random.default_rng(0).standard_normal((1, 4, 6))
    >>> U, V = tiled_svd(W, 2, 2, 2)
    >>> bool(np.allclose(join_tiles(U @ V), W))
    True
    """
    tiles = cut_tiles(stack, rows, columns)
    lead = tiles.shape[:3]
    u, v = truncated_svd(tiles.reshape(-1, *tiles.shape[3:]), rank)
    return u.reshape(*lead, *u.shape[1:]), v.reshape(*lead, *v.shape[1:])
