"""EVBMF against a dense-grid global minimiser, and its invariances."""

import math

import numpy as np
import pytest
import scipy.optimize

from onnxlr.decompose import evbmf
from onnxlr.decompose.evbmf import threshold_tau, threshold_x


def oracle(values: np.ndarray, m: int, n: int, points: int = 6000) -> tuple[int, float, float]:
    """Rank, σ² and the least Ω on a dense grid of log σ², straight from the paper's formulas.

    Shares nothing with the implementation: Ω is written out with its own τ, and the grid is
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


@pytest.mark.parametrize("block", range(10))
def test_agrees_with_the_dense_grid(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        matrix = random_matrix(seed)
        values = np.linalg.svd(matrix, compute_uv=False)
        found = evbmf(values, *matrix.shape)
        rank, sigma2, least = oracle(values, *matrix.shape)
        assert found.free_energy <= least + 1e-9 * max(1.0, abs(least)), seed
        # Where two minima are equally deep to rounding, either is right; Ω is what counts.
        if found.free_energy > least - 1e-9 * max(1.0, abs(least)):
            assert found.rank == rank, seed
            assert found.sigma2 == pytest.approx(sigma2, rel=1e-4), seed
            np.testing.assert_allclose(
                found.shrunk, shrunk(values[:rank], *matrix.shape, sigma2), rtol=1e-3
            )


def shrunk(gamma: np.ndarray, m: int, n: int, sigma2: float) -> np.ndarray:
    """Formula 15 of the NIPS paper, as it stands there."""
    inner = 1 - (m + n) * sigma2 / gamma**2
    return np.asarray(gamma / 2 * (inner + np.sqrt(inner**2 - 4 * m * n * sigma2**2 / gamma**4)))


@pytest.mark.parametrize("alpha", [1e-6, 1e-4, 0.01, 0.3, 1.0])
def test_threshold_is_the_root(alpha: float) -> None:
    tau = threshold_tau(alpha)
    residual = math.log1p(tau) + alpha * math.log1p(tau / alpha) - tau
    slope = 1 / (1 + tau) + alpha / (alpha + tau) - 1
    assert abs(residual) < 1e-12 * abs(slope) * tau + 1e-18
    assert threshold_x(alpha) == pytest.approx(1 + alpha + tau + alpha / tau, rel=1e-12)
    if alpha == 1.0:
        assert tau == pytest.approx(2.5129, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("seed", range(4))
def test_scale_and_transposition_change_nothing(scale: float, seed: int) -> None:
    matrix = random_matrix(seed)
    m, n = matrix.shape
    values = np.linalg.svd(matrix, compute_uv=False)
    plain, scaled = evbmf(values, m, n), evbmf(scale * values, n, m)
    assert plain.rank == scaled.rank
    assert scaled.sigma2 == pytest.approx(plain.sigma2 * scale**2, rel=1e-6)
    np.testing.assert_allclose(scaled.shrunk, scale * plain.shrunk, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_rank_deficiency_is_no_noise(rank: int) -> None:
    rng = np.random.default_rng(rank)
    matrix = rng.standard_normal((30, rank)) @ rng.standard_normal((rank, 50))
    values = np.linalg.svd(matrix, compute_uv=False)
    assert evbmf(values, 30, 50).rank == rank
    values[rank:] = 0.0
    assert evbmf(values, 30, 50).rank == rank


def test_noise_a_flat_spectrum_and_zeros_have_rank_0() -> None:
    noise = np.random.default_rng(5).standard_normal((60, 90))
    assert evbmf(np.linalg.svd(noise, compute_uv=False), 60, 90).rank == 0
    assert evbmf(np.ones(20), 20, 20).rank == 0
    assert evbmf(np.zeros(20), 20, 40).rank == 0
    assert evbmf(np.array([2.0]), 1, 7).rank == 0


def test_noise_variance_is_recovered() -> None:
    rng = np.random.default_rng(2)
    matrix = 3 * rng.standard_normal((200, 10)) @ rng.standard_normal((10, 400))
    found = evbmf(
        np.linalg.svd(matrix + 0.5 * rng.standard_normal((200, 400)), compute_uv=False), 200, 400
    )
    assert found.rank == 10
    assert found.sigma2 == pytest.approx(0.25, rel=0.02)
    # Shrinkage takes the noise's share off each singular value: never more than it adds.
    assert (found.shrunk < np.linalg.svd(matrix, compute_uv=False)[:10] * 1.01).all()


def test_a_spectrum_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="a 5×8 matrix has 5 singular values"):
        evbmf(np.ones(8), 5, 8)
