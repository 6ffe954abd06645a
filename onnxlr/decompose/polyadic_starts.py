"""Where a polyadic decomposition starts from: singular vectors, an eigenproblem, or at random."""

import numpy as np
import scipy.linalg

from onnxlr.decompose.outer_products import Cp, balance, khatri_rao
from onnxlr.decompose.svd import leading_vectors
from onnxlr.types import Array

# Relative error below which a tensor counts as all but of a rank, and Newton steps pay.
NEARLY_EXACT = 0.02


def start_from_hosvd(x: Array, rank: int, rng: np.random.Generator) -> list[Array]:
    """The leading singular vectors of every unfolding, with random columns where they are too few.

    Parameters
    ----------
    x : ndarray of shape (n_1, …, n_k)
    rank : int
    rng : numpy.random.Generator

    Returns
    -------
    list of ndarray of shape (n_i, rank)
    """
    factors = []
    for mode, size in enumerate(x.shape):
        matrix = np.moveaxis(x, mode, 0).reshape(size, -1)
        count = min(rank, size)
        vectors = leading_vectors(matrix, count)
        more = rng.standard_normal((size, rank - count)) / np.sqrt(size)
        factors.append(np.hstack([vectors, more]))
    return factors


def random_start(shape: tuple[int, ...], rank: int, rng: np.random.Generator) -> list[Array]:
    """Factors of shapes (n_i, rank) whose columns have a norm of about 1."""
    return [rng.standard_normal((size, rank)) / np.sqrt(size) for size in shape]


def start_from_pencil(x: Array, rank: int) -> list[Array] | None:
    """The components of a tensor that is all but of this rank, by one eigenproblem.

    Two mixtures of slices share their eigenvectors (Leurgans, Ross & Abel 1993). It takes two modes
    as long as the rank, and a tensor that their leading vectors span; None for any other.

    Parameters
    ----------
    x : ndarray of shape (n_1, …, n_k)
        A tensor of norm 1.
    rank : int

    Returns
    -------
    list of ndarray of shape (n_i, rank), or None
    """
    second, first = (int(m) for m in np.argsort(x.shape, kind="stable")[-2:])
    if rank > x.shape[second]:
        return None
    slices = np.moveaxis(x, (first, second), (0, 1))
    slices = slices.reshape(*slices.shape[:2], -1)
    if slices.shape[2] < 2:
        return None  # a matrix, which the higher-order SVD decomposes
    u = leading_vectors(slices.reshape(len(slices), -1), rank)
    v = leading_vectors(slices.transpose(1, 0, 2).reshape(slices.shape[1], -1), rank)
    core = np.einsum("ar,abp,bs->prs", u, slices, v)
    if float(np.sum(x**2) - np.sum(core**2)) > NEARLY_EXACT**2:
        return None
    mixtures = leading_vectors(core.reshape(len(core), -1), 2)
    top, next_ = np.tensordot(mixtures, core, (0, 0))
    vectors = np.real(scipy.linalg.eig(top, next_)[1])
    try:
        b = v @ np.linalg.inv(vectors).T
    except np.linalg.LinAlgError:
        return None
    a = u @ next_ @ vectors
    # Column r of what remains is the product of all the other modes in component r.
    pairs, right = khatri_rao([a, b]), slices.reshape(-1, slices.shape[2])
    columns = np.linalg.lstsq(pairs, right, rcond=None)[0]
    rest = [m for m in range(x.ndim) if m not in (first, second)]
    factors = [np.zeros((size, rank)) for size in x.shape]
    factors[first], factors[second] = a, b
    for r, column in enumerate(columns):
        product = column.reshape([x.shape[m] for m in rest])
        for axis, mode in enumerate(rest):
            line = np.moveaxis(product, axis, 0).reshape(product.shape[axis], -1)
            factors[mode][:, r] = leading_vectors(line, 1)[:, 0]
        size = product
        for mode in rest:
            size = np.tensordot(factors[mode][:, r], size, (0, 0))
        factors[rest[0]][:, r] *= float(size)
    return balance(factors)


def exact_decomposition(x: Array, rank: int) -> Cp:
    """The decomposition in which every fibre along the longest mode is one component.

    Parameters
    ----------
    x : ndarray of shape (n_1, …, n_k)
    rank : int
        At least ``exact_rank(x.shape)``; components beyond that are zero.
    """
    longest = int(np.argmax(x.shape))
    others = [m for m in range(x.ndim) if m != longest]
    places = np.indices([x.shape[m] for m in others]).reshape(len(others), -1)
    factors = [np.zeros((size, rank)) for size in x.shape]
    count = places.shape[1]
    for mode, index in zip(others, places, strict=True):
        factors[mode][index, np.arange(count)] = 1.0
    factors[longest][:, :count] = np.moveaxis(x, longest, 0).reshape(x.shape[longest], -1)
    return Cp(tuple(factors), 0.0, 1.0)
