"""Truncated SVD: Eckart-Young, planted spectra, scale, nesting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr.decompose import singular_values, tail_error, truncated_svd
from onnxlr.decompose import svd as svd_module
from onnxlr.decompose.svd import _lanczos, _partial_svd, leading_vectors, top_eigenpairs
from onnxlr.types import Array


def planted(values: list[float], m: int, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((m, len(values))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(values))))[0]
    return np.asarray(u @ np.diag(values) @ v.T)


def test_planted_spectrum_is_recovered() -> None:
    matrix = planted([3.142, 2.718, 1.0], 40, 25, seed=3)
    values = singular_values(matrix[None])[0]
    np.testing.assert_allclose(values[:3], [3.142, 2.718, 1.0], rtol=1e-14)
    assert values[3:].max() < 1e-14


@settings(max_examples=60, deadline=None)
@given(
    g=st.integers(1, 3),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_truncation_error_is_the_tail(
    g: int, m: int, n: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    stack = np.random.default_rng(seed).standard_normal((g, m, n))
    u, v = truncated_svd(stack, rank)
    assert u.shape == (g, m, rank)
    assert v.shape == (g, rank, n)
    error = np.linalg.norm(stack - u @ v) / np.linalg.norm(stack)
    assert error == pytest.approx(tail_error(singular_values(stack))[rank], rel=1e-9, abs=1e-13)
    np.testing.assert_allclose(
        u.transpose(0, 2, 1) @ u, np.tile(np.eye(rank), (g, 1, 1)), atol=1e-12
    )


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e12])
def test_scale_goes_into_the_second_factor(scale: float) -> None:
    matrix = np.random.default_rng(0).standard_normal((1, 12, 30))
    u, v = truncated_svd(matrix, 5)
    scaled_u, scaled_v = truncated_svd(scale * matrix, 5)
    np.testing.assert_allclose(scaled_u, u, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scaled_v, scale * v, rtol=1e-9, atol=1e-12 * scale)


def test_factors_nest() -> None:
    matrix = np.random.default_rng(1).standard_normal((2, 9, 14))
    u, v = truncated_svd(matrix, 7)
    small_u, small_v = truncated_svd(matrix, 3)
    np.testing.assert_array_equal(u[:, :, :3], small_u)
    np.testing.assert_array_equal(v[:, :3], small_v)


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_a_rank_outside_the_matrix_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is outside 1 to 5"):
        truncated_svd(np.ones((1, 5, 8)), rank)


def spectrum_shaped(kind: str, m: int, n: int) -> tuple[Array, Array]:
    """A matrix of planned singular values and left vectors."""
    count = min(m, n)
    i = np.arange(count)
    values = {
        "geometric": 0.95**i,
        "power": (i + 1.0) ** -1,
        "slow": (i + 1.0) ** -0.5,
        "flat": np.ones(count),
        "step": np.where(i < 12, 1.0, 1e-3),
        "steep": 0.3**i,
        "deficient": np.where(i < 5, 1.0 + i, 0.0),
    }[kind]
    values = np.sort(values)[::-1]
    rng = np.random.default_rng(5)
    u = np.linalg.qr(rng.standard_normal((m, count)))[0]
    v = np.linalg.qr(rng.standard_normal((n, count)))[0]
    return (u * values) @ v.T, u


@pytest.mark.parametrize(("m", "n"), [(160, 400), (400, 160), (200, 200)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["geometric", "power", "slow", "step"])
def test_a_partial_decomposition_spans_the_exact_subspace(
    kind: str, m: int, n: int, scale: float
) -> None:
    matrix, exact = spectrum_shaped(kind, m, n)
    rank = 12
    assert _partial_svd(np.asfortranarray(scale * matrix), rank) is not None
    u, v = truncated_svd(scale * matrix[None], rank)
    outside = u[0] - exact[:, :rank] @ (exact[:, :rank].T @ u[0])
    assert np.linalg.norm(outside, 2) < 1e-6
    np.testing.assert_allclose(u[0].T @ u[0], np.eye(rank), atol=1e-12)
    error = np.linalg.norm(matrix - u[0] @ v[0] / scale)
    optimum = np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:])
    assert error == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("kind", ["flat", "steep", "deficient"])
def test_what_has_no_gap_to_see_is_decomposed_whole(kind: str) -> None:
    matrix, _ = spectrum_shaped(kind, 160, 200)
    rank = 32
    assert _partial_svd(np.asfortranarray(matrix), rank) is None
    u, v = truncated_svd(matrix[None], rank)
    np.testing.assert_allclose(u[0].T @ u[0], np.eye(rank), atol=1e-12)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert np.linalg.norm(matrix - u[0] @ v[0]) == pytest.approx(
        np.linalg.norm(values[rank:]), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize(("m", "n"), [(20, 50), (50, 20), (20, 20)])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_leading_vectors_are_those_of_the_svd(m: int, n: int, rank: int) -> None:
    matrix, exact = spectrum_shaped("power", m, n)
    vectors = leading_vectors(matrix, rank)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-12)
    np.testing.assert_allclose(np.abs(vectors.T @ exact[:, :rank]), np.eye(rank), atol=1e-7)


def test_more_vectors_than_columns_complete_a_basis() -> None:
    matrix = np.random.default_rng(0).standard_normal((9, 3))
    vectors = leading_vectors(matrix, 6)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(vectors[:, :3] @ (vectors[:, :3].T @ matrix), matrix, atol=1e-12)


def symmetric(values: Array, seed: int = 0) -> Array:
    """A matrix with these eigenvalues."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    matrix: Array = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2


SPECTRA: dict[str, Array] = {
    "decaying": 1.0 / np.arange(1, 601.0),
    "flat": np.linspace(0.5, 1.0, 600),
    "repeated": np.repeat([5.0, 3.0, 1.0, 0.5], [3, 4, 10, 583]),
    "identity": np.ones(600),
    "of low rank": np.append(np.arange(1.0, 6.0), np.zeros(595)),
    "zero": np.zeros(600),
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("count", [1, 5, 20])
def test_few_of_many_eigenpairs(kind: str, count: int) -> None:
    """By Lanczos iterations or, where what repeats may hide from them, by LAPACK."""
    matrix = symmetric(SPECTRA[kind])
    values, vectors = top_eigenpairs(matrix.copy(), count)
    wanted = np.sort(SPECTRA[kind])[-count:]
    np.testing.assert_allclose(values, wanted, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-10)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-10)
    again = top_eigenpairs(matrix.copy(), count)
    assert [a.tobytes() for a in again] == [values.tobytes(), vectors.tobytes()]


def test_iterations_serve_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """For few of many, and not where they left a direction out that is as large."""
    assert _lanczos(symmetric(SPECTRA["decaying"]), 20) is not None
    seen: list[int] = []

    def counted(_: Array, count: int) -> None:
        seen.append(count)

    monkeypatch.setattr(svd_module, "_lanczos", counted)
    for n, count in ((600, 25), (600, 26), (500, 2)):
        top_eigenpairs(np.eye(n), count)
    assert seen == [25]
    monkeypatch.undo()

    def lacking(gram: Array, count: int, **_: object) -> tuple[Array, Array]:
        values, vectors = np.linalg.eigh(gram)
        kept = np.append(np.arange(len(gram) - count - 1, len(gram) - 2), len(gram) - 1)
        return values[kept], vectors[:, kept]  # all but the second largest

    monkeypatch.setattr(svd_module, "eigsh", lacking)
    assert _lanczos(symmetric(SPECTRA["decaying"]), 20) is None
    values, _ = top_eigenpairs(symmetric(SPECTRA["decaying"]), 20)
    np.testing.assert_allclose(values, np.sort(SPECTRA["decaying"])[-20:], rtol=1e-10)
