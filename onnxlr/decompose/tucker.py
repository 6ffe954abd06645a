"""Partial Tucker decomposition of convolution kernels: channels compressed, positions kept."""

import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose.svd import leading_vectors

Array = NDArray[np.float64]

_EPS = np.finfo(np.float64).eps
_MOST_SWEEPS = 50
_TOLERANCE = 1e-5  # relative change of the squared error at which a sweep counts as the last


def tucker2(
    kernel: NDArray[np.generic], ranks: tuple[int, int], sweeps: int = _MOST_SWEEPS
) -> tuple[Array, Array, Array]:
    """Tucker-2 of a kernel: ``K[t, s, p] ≈ Σ U[t, a] · C[a, b, p] · V[s, b]``.

    Starts from the truncated higher-order SVD and improves it by higher-order orthogonal
    iteration (De Lathauwer, De Moor & Vandewalle 2000), which never lowers the core's norm. With
    orthonormal factors, ‖K − K̂‖² = ‖K‖² − ‖C‖².

    Parameters
    ----------
    kernel : ndarray of shape (T, S, P)
        Output channels, input channels, kernel positions.
    ranks : tuple of int
        ``(r_s, r_t)``: of the input and of the output channels, as in Kim et al. 2015.
    sweeps : int
        The most; with none it's the truncated higher-order SVD.

    Returns
    -------
    V : ndarray of shape (S, r_s)
    C : ndarray of shape (r_t, r_s, P)
    U : ndarray of shape (T, r_t)

    Examples
    --------
    >>> K = np.random.default_rng(0).standard_normal((6, 5, 9))
    >>> V, C, U = tucker2(K, (5, 6))
    >>> bool(np.allclose(np.einsum("ta,abp,sb->tsp", U, C, V), K))
    True
    """
    k = np.asarray(kernel, dtype=np.float64)
    scale = float(np.abs(k).max(initial=0.0)) or 1.0
    k = k / scale
    outputs, inputs, _ = k.shape
    r_s, r_t = ranks
    v = leading_vectors(k.transpose(1, 0, 2).reshape(inputs, -1), r_s)
    u = leading_vectors(k.reshape(outputs, -1), r_t)
    core = np.tensordot(u, np.tensordot(k, v, (1, 0)).transpose(0, 2, 1), (0, 0))
    whole, previous = float(np.sum(k**2)), 0.0
    for _ in range(sweeps):
        # (S, r_t·P): what is left of the kernel once the outputs are projected, and so on in turn.
        v = leading_vectors(np.tensordot(k, u, (0, 0)).reshape(inputs, -1), r_s)
        projected = np.tensordot(k, v, (1, 0)).transpose(0, 2, 1)
        u = leading_vectors(projected.reshape(outputs, -1), r_t)
        core = np.tensordot(u, projected, (0, 0))
        norm = float(np.sum(core**2))
        if norm - previous <= _TOLERANCE * max(whole - norm, _EPS * whole):
            break
        previous = norm
    return v, core * scale, u
