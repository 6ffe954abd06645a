"""CP: planted components come back, degeneracy is seen, scale and seeds change nothing."""

import numpy as np
import pytest
import tensorly.decomposition

from onnxlr.decompose import compose, cp, exact_rank
from onnxlr.decompose.outer_products import Cp
from onnxlr.decompose.polyadic_descent import Descent


def planted(shape: tuple[int, ...], rank: int, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((n, rank)) for n in shape)


@pytest.mark.parametrize(
    ("shape", "rank"), [((16, 12, 9), 5), ((24, 20, 3, 3), 6), ((8, 9, 10), 1), ((4, 30, 25), 8)]
)
def test_known_components_are_recovered(shape: tuple[int, ...], rank: int) -> None:
    factors = planted(shape, rank, seed=1)
    result = cp(compose(factors), rank)
    assert result.error < 1e-7
    assert not result.degenerate
    np.testing.assert_allclose(compose(result.factors), compose(factors), atol=1e-5)
    # Up to their order, the components themselves: each one is parallel to one planted.
    for mine, theirs in zip(result.factors, factors, strict=True):
        cosines = np.abs(
            (mine / np.linalg.norm(mine, axis=0)).T @ (theirs / np.linalg.norm(theirs, axis=0))
        )
        np.testing.assert_allclose(cosines.max(axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 2, 3)])
def test_from_the_exact_rank_on_any_tensor_is_exact(shape: tuple[int, ...]) -> None:
    tensor = np.random.default_rng(0).standard_normal(shape)
    rank = exact_rank(shape)
    for r in (rank, rank + 3):
        result = cp(tensor, r)
        assert all(f.shape == (n, r) for f, n in zip(result.factors, shape, strict=True))
        np.testing.assert_allclose(compose(result.factors), tensor, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_goes_equally_into_the_factors(scale: float) -> None:
    tensor = np.random.default_rng(2).standard_normal((8, 7, 6))
    plain, scaled = cp(tensor, 3), cp(scale * tensor, 3)
    assert scaled.error == pytest.approx(plain.error, rel=1e-6)
    for a, b in zip(plain.factors, scaled.factors, strict=True):
        np.testing.assert_allclose(b, a * scale ** (1 / 3), rtol=1e-5, atol=1e-7 * scale ** (1 / 3))


def test_the_error_is_that_of_the_factors_and_no_worse_than_tensorly_s() -> None:
    ratios = []
    for seed in range(6):
        tensor = np.random.default_rng(seed).standard_normal((24, 18, 9))
        result = cp(tensor, 6)
        error = np.linalg.norm(tensor - compose(result.factors)) / np.linalg.norm(tensor)
        assert result.error == pytest.approx(error, rel=1e-9)
        theirs = tensorly.decomposition.parafac(
            tensor, 6, n_iter_max=200, init="random", random_state=seed, tol=1e-9
        )
        their_error = np.linalg.norm(tensor - tensorly.cp_to_tensor(theirs))
        ratios.append(error * np.linalg.norm(tensor) / their_error)
    assert np.mean(ratios) <= 1.001


def border_tensor(n: int) -> np.ndarray:
    """a∘a∘b + a∘b∘a + b∘a∘a: rank 3, yet the limit of rank-2 tensors whose parts diverge."""
    rng = np.random.default_rng(3)
    a, b = np.linalg.qr(rng.standard_normal((n, 2)))[0].T
    parts = ((a, a, b), (a, b, a), (b, a, a))
    return np.asarray(sum(np.einsum("i,j,k->ijk", *part) for part in parts))


def test_degeneracy_is_bounded_where_plain_iteration_diverges() -> None:
    """De Silva & Lim's example: no best rank-2 approximation exists."""
    result = cp(border_tensor(6), 2)
    assert not result.degenerate
    assert result.growth < 100
    assert result.error < 0.01
    assert all(np.isfinite(f).all() for f in result.factors)
    assert Cp((), 0.0, float("inf")).degenerate
    assert Cp((), 0.0, float("nan")).degenerate


def test_a_trained_network_s_spectrum_is_decomposed_stably() -> None:
    """Channels that decay, where plain iteration goes on to ever larger components."""
    rng = np.random.default_rng(0)
    decay = (1 + np.arange(32)) ** -0.5
    tensor = np.einsum("tsp,t,s->tsp", rng.standard_normal((32, 32, 9)), decay, decay)
    result = cp(tensor, 16)
    growth, error = [], []
    for sweeps in (100, 1000):
        weights, factors = tensorly.decomposition.parafac(
            tensor, 16, n_iter_max=sweeps, init="random", random_state=0, tol=0
        )
        squares = np.prod([np.sum(f**2, axis=0) for f in factors], axis=0)
        growth.append(np.sum(weights**2 * squares) / np.linalg.norm(tensor) ** 2)
        difference = tensor - tensorly.cp_to_tensor((weights, factors))
        error.append(np.linalg.norm(difference) / np.linalg.norm(tensor))
    assert growth[1] > 300  # what is to be prevented
    assert result.growth < 100
    assert result.error < error[0]  # and not by stopping short


def test_the_same_seed_gives_the_same_bits() -> None:
    tensor = np.random.default_rng(4).standard_normal((9, 8, 7))
    for a, b in zip(cp(tensor, 4).factors, cp(tensor, 4).factors, strict=True):
        np.testing.assert_array_equal(a, b)


def test_zeros_and_nonsense() -> None:
    assert cp(np.zeros((3, 4, 5)), 2).error == 0.0
    with pytest.raises(ValueError, match="no CP of rank 0"):
        cp(np.ones((3, 4, 5)), 0)
    with pytest.raises(ValueError, match="shape \\(3, 4\\)"):
        cp(np.ones((3, 4)), 2)


@pytest.mark.parametrize(
    "shape", [(5, 4, 3), (4, 5, 3), (30, 18, 3, 2), (2, 40, 17, 3), (19, 3, 2, 2, 3), (20, 18, 17)]
)
def test_products_with_all_factors_but_one(shape: tuple[int, ...]) -> None:
    """Whichever axis is contracted first."""
    rng = np.random.default_rng(0)
    x, factors = rng.standard_normal(shape), planted(shape, 7, seed=2)
    letters = "abcde"[: len(shape)]
    for mode, letter in enumerate(letters):
        others = [m for m in range(len(shape)) if m != mode]
        terms = ",".join(f"{letters[m]}r" for m in others)
        slow = np.einsum(f"{letters},{terms}->{letter}r", x, *(factors[m] for m in others))
        np.testing.assert_allclose(
            Descent(x)._contract(factors, mode), slow, rtol=1e-10, atol=1e-12
        )
