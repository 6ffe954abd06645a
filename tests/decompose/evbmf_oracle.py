"""A slow EVBMF that shares nothing with the fast one: the paper's formulas on a dense grid."""

import math

import numpy as np
import scipy.optimize

from onnxlr.decompose import evbmf


def disagreement(matrix: np.ndarray) -> str | None:
    """What differs between EVBMF and the dense grid on a matrix; None if nothing does."""
    values = np.linalg.svd(matrix, compute_uv=False)
    result = evbmf(values, *matrix.shape)
    rank, sigma2, least = oracle(values, *matrix.shape)
    slack = 1e-9 * max(1.0, abs(least))
    if result.free_energy > least + slack:
        return f"free energy {result.free_energy} above the grid's {least}"
    if result.free_energy < least - slack:
        return None  # deeper than the grid could see: the grid is what is wrong
    if result.rank != rank:
        return f"rank {result.rank}, the grid has {rank}"
    if not math.isclose(result.sigma2, sigma2, rel_tol=1e-4):
        return f"noise {result.sigma2}, the grid has {sigma2}"
    expected = shrunk(values[:rank], matrix.shape[0], matrix.shape[1], sigma2)
    return None if np.allclose(result.shrunk, expected, rtol=1e-3, atol=0) else "shrunk values"


def oracle(values: np.ndarray, m: int, n: int, points: int = 6000) -> tuple[int, float, float]:
    """Rank, σ² and the least Ω on a dense grid of log σ², straight from the paper's formulas.

    Shares nothing with the implementation: Ω is written out with another τ, and the grid is
    refined around its best point only.
    """
    L, M = min(m, n), max(m, n)
    s = values / values[0]
    alpha = L / M
    tau_bar = scipy.optimize.bisect(
        lambda t: math.log(1 + t) + alpha * math.log(1 + t / alpha) - t, 1e-3 * alpha**0.5, 10
    )
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    h = min(math.ceil(L / (1 + alpha)) - 1, L)
    lower = max(s[h] ** 2 / (M * x_bar), (s[h:] ** 2).sum() / (M * (L - h)), 1e-34)
    upper = (s**2).sum() / (L * M)

    def omega(u: np.ndarray) -> np.ndarray:
        x = s**2 / (M * np.exp(u)[:, None])
        c = np.maximum(x, x_bar) - 1 - alpha
        tau = 0.5 * (c + np.sqrt(c * c - 4 * alpha))
        extra = np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau
        # ψ(x) = x − log x + …; −log x = u − log(γ²/M), whose constant part is left out.
        return np.asarray((x + u[:, None] + np.where(x > x_bar, extra, 0)).sum(axis=1))

    grid = np.linspace(math.log(lower), math.log(max(upper, lower)), points)
    for _ in range(4):
        best = int(np.argmin(omega(grid)))
        a, b = grid[max(0, best - 1)], grid[min(points - 1, best + 1)]
        least = float(grid[best])
        grid = np.linspace(a, b, 400)
        points = 400
    sigma2 = math.exp(least)
    rank = int(np.count_nonzero(s > math.sqrt(M * sigma2 * x_bar)))
    return rank, sigma2 * values[0] ** 2, float(omega(np.array([least]))[0])


def random_matrix(seed: int) -> np.ndarray:
    """Low rank plus noise, decaying, flat, tiny, square and skewed ones in turn."""
    rng = np.random.default_rng(seed)
    m, n = int(rng.integers(2, 70)), int(rng.integers(2, 140))
    kind = seed % 4
    if kind == 0:
        rank = int(rng.integers(1, min(m, n) + 1))
        signal = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
        return np.asarray(signal + rng.uniform(0.01, 3) * rng.standard_normal((m, n)))
    if kind == 1:
        values = np.exp(-rng.uniform(0.02, 1.0) * np.arange(min(m, n)))
        u = np.linalg.qr(rng.standard_normal((m, min(m, n))))[0]
        v = np.linalg.qr(rng.standard_normal((n, min(m, n))))[0]
        return np.asarray(u * values @ v.T + 1e-3 * rng.standard_normal((m, n)))
    if kind == 2:
        return rng.standard_normal((m, n))
    return np.asarray(rng.standard_t(2.5, size=(m, n)) * rng.lognormal(size=(m, 1)))


def shrunk(gamma: np.ndarray, m: int, n: int, sigma2: float) -> np.ndarray:
    """Formula 15 of the NIPS paper, as it stands there."""
    inner = 1 - (m + n) * sigma2 / gamma**2
    return np.asarray(gamma / 2 * (inner + np.sqrt(inner**2 - 4 * m * n * sigma2**2 / gamma**4)))
