"""Which channels go, beside an exhaustive search; what the readers become, beside raw rows."""

import itertools

import numpy as np
import pytest

from onnxlr.decompose.interpolative import Elimination, Reading, elimination, refitted
from tests.support.builders import Array


def activations(seed: int, rows: int = 400, channels: int = 7) -> Array:
    """Rows of channels that hang together."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, channels)) @ rng.standard_normal((channels, channels))
    return np.asarray(np.maximum(mixed, 0.0))


def slow_error(x: Array, weight: Array, kept: list[int]) -> float:
    """Relative error of the best linear map from the kept columns, by least squares on rows."""
    y = x @ weight.T
    rest = y - x[:, kept] @ np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    return float(np.linalg.norm(rest) / np.linalg.norm(y))


@pytest.mark.parametrize("seed", range(4))
def test_errors_are_those_of_least_squares_on_the_rows(seed: int) -> None:
    x = activations(seed)
    weight = np.random.default_rng(seed + 10).standard_normal((5, 7))
    found = elimination([Reading(x.T @ x / len(x), weight)])
    assert sorted(found.order.tolist()) == list(range(7))
    for count in range(1, 7):
        expected = slow_error(x, weight, found.kept(count).tolist())
        assert found.errors[7 - count] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_to_go_is_the_one_that_costs_least(seed: int) -> None:
    x = activations(seed)
    weight = np.random.default_rng(seed + 10).standard_normal((5, 7))
    found = elimination([Reading(x.T @ x / len(x), weight)])
    errors = {j: slow_error(x, weight, [i for i in range(7) if i != j]) for j in range(7)}
    assert found.order[0] == min(errors, key=lambda j: errors[j])
    # Greedy, and not far from the best of all sets.
    best = min(slow_error(x, weight, list(s)) for s in itertools.combinations(range(7), 4))
    assert found.errors[3] < 1.5 * best + 1e-9


def test_readers_of_different_activations_count_together() -> None:
    x, z = activations(1), activations(2)
    a, b = (np.random.default_rng(s).standard_normal((4, 7)) for s in (3, 4))
    found = elimination([Reading(x.T @ x / 400, a), Reading(z.T @ z / 400, b)])
    total = np.linalg.norm(x @ a.T) ** 2 + np.linalg.norm(z @ b.T) ** 2
    kept = found.kept(4).tolist()
    lost = [slow_error(v, w, kept) * np.linalg.norm(v @ w.T) for v, w in ((x, a), (z, b))]
    assert found.errors[3] == pytest.approx(np.sqrt(sum(np.square(lost)) / total), rel=1e-4)


def test_scale_changes_nothing() -> None:
    x = activations(5)
    weight = np.random.default_rng(6).standard_normal((5, 7))
    moments = x.T @ x / len(x)
    plain, scaled = elimination([Reading(moments, weight)]), None
    scaled = elimination([Reading(1e-8 * moments, 1e5 * weight)])
    assert plain.order.tolist() == scaled.order.tolist()
    np.testing.assert_allclose(plain.errors, scaled.errors, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2, 3, 40, 130])
def test_copies_go_first_whatever_the_size(channels: int) -> None:
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((500, channels))
    x = np.concatenate([x, x[:, : channels // 2]], axis=1)
    weight = rng.standard_normal((9, x.shape[1]))
    found: Elimination = elimination([Reading(x.T @ x / 500, weight)])
    gone = channels // 2
    assert found.errors[gone] < 1e-5
    assert gone + 1 == len(found.errors) or found.errors[gone + 1] > 1e-3


def test_what_nothing_reads_goes_without_loss() -> None:
    found = elimination([Reading(np.eye(5), np.zeros((3, 5)))])
    assert found.errors.tolist() == [0.0] * 5


@pytest.mark.parametrize("ridge", [1e-9, 0.3])
def test_the_new_weight_is_the_solution_on_raw_rows(ridge: float) -> None:
    """The ridge is a row for each kept channel, that asks for the prior."""
    x = activations(7)
    rng = np.random.default_rng(8)
    weight, kept = rng.standard_normal((5, 7)), [0, 2, 3, 6]
    prior = rng.standard_normal((5, 4))
    second = x.T @ x / len(x)
    found = refitted(weight, second[:, kept], second[np.ix_(kept, kept)], prior, ridge)
    pull = np.diag(np.sqrt(ridge * len(x) * np.diag(second)[kept]))
    rows = np.concatenate([x[:, kept], pull])
    wanted = np.concatenate([x @ weight.T, pull @ prior.T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
