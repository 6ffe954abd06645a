"""Partial Tucker decomposition of convolution kernels: of the channels, not of the positions."""

import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose.svd import leading_vectors
from onnxlr.types import Array

_EPS = np.finfo(np.float64).eps
_MOST_SWEEPS = 50
_TOLERANCE = 1e-5  # relative change of the squared error at which a sweep counts as the last


def tucker2(
    kernel: NDArray[np.generic],
    ranks: tuple[int, int],
    sweeps: int = _MOST_SWEEPS,
    start: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Tucker-2 of a kernel: ``K[t, s, p] ≈ Σ U[t, a] · C[a, b, p] · V[s, b]``.

    Starts from the truncated higher-order SVD and improves it by higher-order orthogonal
    iteration (De Lathauwer, De Moor & Vandewalle 2000), which never lowers the core's norm. With
    orthonormal factors, ‖K − K̂‖² = ‖K‖² − ‖C‖².

    Parameters
    ----------
    kernel : ndarray of shape (T, S, P) or (g, T, S, P)
        Output channels, input channels, kernel positions; or a stack of such kernels, which are
        decomposed side by side, until the last of them is done.
    ranks : tuple of int
        ``(r_s, r_t)``, the ranks of the input and of the output channels, as in Kim et al. 2015
        (arXiv 1511.06530).
    sweeps : int
        The most sweeps; with none the result is the truncated higher-order SVD.
    start : ndarray of shape (T, r_t) or (g, T, r_t), optional
        An orthonormal U to start from instead: that of a kernel nearby.

    Returns
    -------
    V : ndarray of shape (S, r_s)
    C : ndarray of shape (r_t, r_s, P)
    U : ndarray of shape (T, r_t)
        Each with a first axis g for a stack.

    Examples
    --------
    >>> K = np.random.default_rng(0).standard_normal((6, 5, 9))
    >>> V, C, U = tucker2(K, (5, 6))
    >>> bool(np.allclose(np.einsum("ta,abp,sb->tsp", U, C, V), K))
    True
    """
    if kernel.ndim == 3:
        first = None if start is None else start[None]
        v, core, u = tucker2(kernel[None], ranks, sweeps, first)
        return v[0], core[0], u[0]
    k = np.asarray(kernel, dtype=np.float64)
    scale = np.abs(k).max(axis=(1, 2, 3), keepdims=True, initial=0.0)
    scale[scale == 0.0] = 1.0
    k = k / scale
    stack, outputs, inputs, _ = k.shape
    r_s, r_t = ranks
    by_inputs = k.transpose(0, 2, 1, 3).reshape(stack, inputs, -1)  # (g, S, T·P)
    u = leading_vectors(k.reshape(stack, outputs, -1), r_t) if start is None else start
    if sweeps == 0:
        v = leading_vectors(by_inputs, r_s)
        core = _core(u, _project_inputs(k, v))
    whole, previous = np.sum(k**2, axis=(1, 2, 3)), np.zeros(stack)
    for _ in range(sweeps):
        # What is left of the kernel once the outputs are projected, and so on in turn.
        rest = u.swapaxes(1, 2) @ k.reshape(stack, outputs, -1)  # (g, r_t, S·P)
        rest = rest.reshape(stack, r_t, inputs, -1).transpose(0, 2, 1, 3)
        v = leading_vectors(rest.reshape(stack, inputs, -1), r_s)
        projected = _project_inputs(k, v)
        u = leading_vectors(projected.reshape(stack, outputs, -1), r_t)
        core = _core(u, projected)
        norm = np.sum(core**2, axis=(1, 2, 3))
        if np.all(norm - previous <= _TOLERANCE * np.maximum(whole - norm, _EPS * whole)):
            break
        previous = norm
    return v, core * scale, u


def _project_inputs(k: Array, v: Array) -> Array:
    """A kernel (g, T, S, P) whose inputs are projected by (g, S, r_s): (g, T, r_s, P)."""
    return np.asarray(v.swapaxes(1, 2)[:, None] @ k)


def _core(u: Array, projected: Array) -> Array:
    """The core (g, r_t, r_s, P) of U (g, T, r_t) and a kernel with projected inputs."""
    stack, outputs, *rest = projected.shape
    flat = u.swapaxes(1, 2) @ projected.reshape(stack, outputs, -1)
    return np.asarray(flat.reshape(stack, -1, *rest))
