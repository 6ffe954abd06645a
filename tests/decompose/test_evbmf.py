"""EVBMF against a dense-grid global minimiser, and its invariances."""

import math

import numpy as np
import pytest

from onnxlr.decompose import evbmf
from onnxlr.decompose.evbmf import threshold_tau, threshold_x
from tests.decompose.evbmf_oracle import disagreement, random_matrix


@pytest.mark.parametrize("block", range(10))
def test_agrees_with_the_dense_grid(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        assert disagreement(random_matrix(seed)) is None, seed


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
    result = evbmf(
        np.linalg.svd(matrix + 0.5 * rng.standard_normal((200, 400)), compute_uv=False), 200, 400
    )
    assert result.rank == 10
    assert result.sigma2 == pytest.approx(0.25, rel=0.02)
    # Shrinkage takes the noise's share off each singular value: never more than it adds.
    assert (result.shrunk < np.linalg.svd(matrix, compute_uv=False)[:10] * 1.01).all()


def test_a_spectrum_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="a 5×8 matrix has 5 singular values"):
        evbmf(np.ones(8), 5, 8)
