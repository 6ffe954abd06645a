"""The regression of a layer's output on inputs that have moved, from covariances and from rows."""

from typing import cast

import numpy as np
import pytest

from onnxlr.calibrate.statistics import RunningMoments, RunningSums
from onnxlr.rewrite import pairs as pairs_module
from onnxlr.rewrite.pairs import DensePairs, WidePairs
from onnxlr.types import Array


def moved(rows: int, n: int, noise: float, seed: int = 0) -> tuple[Array, Array, Array]:
    """A weight, inputs x̂, and the outputs that inputs had before they moved and lost something."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n, n)) * 0.8 ** np.arange(n)
    x = rng.standard_normal((rows, n)) @ mixing.T + 2.0
    moving = np.eye(n) + 0.1 * rng.standard_normal((n, n))
    weight = rng.standard_normal((5, n))
    y = x @ weight.T + noise * rng.standard_normal((rows, 5))
    return weight, x @ moving.T, y


def wide(weight: Array, x_hat: Array, y: Array) -> WidePairs:
    return WidePairs(weight[None], x_hat[None].astype(np.float32), y[None].astype(np.float32), None)


@pytest.mark.parametrize("share", [1e-3, 1e-1, 10.0])
@pytest.mark.parametrize(("rows", "n"), [(60, 20), (30, 80)])
def test_the_target_is_least_squares_with_a_ridge_to_the_weight(
    rows: int, n: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an oracle that appends the ridge as rows of its own."""
    monkeypatch.setattr(pairs_module, "_RIDGES", (share,))
    weight, x_hat, y = moved(rows, n, 0.0)
    x, centred = x_hat - x_hat.mean(axis=0), y - y.mean(axis=0)
    ridge = share * np.trace(x @ x.T) / rows
    whole = np.vstack([x, np.sqrt(ridge) * np.eye(n)])
    right = np.vstack([centred - x @ weight.T, np.zeros((n, 5))])
    change = np.linalg.lstsq(whole, right, rcond=None)[0].T
    found = wide(weight, x_hat, y)
    np.testing.assert_allclose(found.target(None)[0] - weight, change, rtol=2e-3, atol=2e-3)
    assert np.linalg.norm(change) > 0.1
    np.testing.assert_allclose(found.centre[0], y.mean(axis=0), rtol=1e-5)
    # With other outputs, the regression of those.
    other = np.random.default_rng(1).standard_normal((rows, 5))
    right = np.vstack([centred + other - other.mean(axis=0) - x @ weight.T, np.zeros((n, 5))])
    change = np.linalg.lstsq(whole, right, rcond=None)[0].T
    made = found.target(other[None].astype(np.float32))[0]
    np.testing.assert_allclose(made - weight, change, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(
        found.outputs(weight[None])[0], x_hat @ weight.T, rtol=1e-4, atol=1e-3
    )


def test_covariances_give_least_squares_with_a_ridge_to_the_weight() -> None:
    """Beside an oracle on the rows themselves: what y is, and a small pull towards the weight."""
    rows, n = 400, 12
    weight, x_hat, y = moved(rows, n, 0.0)
    x = y @ np.linalg.pinv(weight).T  # inputs before they moved, up to what the weight doesn't see
    sums = RunningSums(1, n, paired=True)
    sums.collect(x_hat[None].copy(), x[None].copy())
    found = DensePairs(weight[None], cast(RunningMoments, sums), [])
    inputs, outputs = x_hat - x_hat.mean(axis=0), y - y.mean(axis=0)
    ridge = pairs_module._RIDGE * np.trace(inputs.T @ inputs / rows) / n
    whole = np.vstack([inputs, np.sqrt(rows * ridge) * np.eye(n)])
    right = np.vstack([outputs, np.sqrt(rows * ridge) * weight.T])
    expected = np.linalg.lstsq(whole, right, rcond=None)[0].T
    np.testing.assert_allclose(found.target(None)[0], expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.centre[0], y.mean(axis=0), rtol=1e-4)
    assert np.linalg.norm(expected - weight) > 0.1 * np.linalg.norm(weight)


def test_the_ridge_is_the_one_that_predicts_rows_left_out() -> None:
    """Each row is left out in turn, and predicted by a regression of the others."""
    chosen = set()
    for noise in (0.0, 3.0, 300.0):
        weight, x_hat, y = moved(40, 60, noise, seed=3)
        x, centred = x_hat - x_hat.mean(axis=0), y - y.mean(axis=0)
        lacking = centred - x @ weight.T
        mean = np.trace(x @ x.T) / 40
        errors = [float(np.sum(lacking**2))]
        for share in pairs_module._RIDGES:
            total = 0.0
            for i in range(40):
                rest = np.delete(np.arange(40), i)
                gram = x[rest] @ x[rest].T + share * mean * np.eye(39)
                predicted = x[i] @ x[rest].T @ np.linalg.solve(gram, lacking[rest])
                total += float(np.sum((lacking[i] - predicted) ** 2))
            errors.append(total)
        best = int(np.argmin(errors))
        chosen.add(best)
        target = wide(weight, x_hat, y).target(None)[0]
        if best == 0:
            np.testing.assert_array_equal(target, weight)
            continue
        gram = x @ x.T + pairs_module._RIDGES[best - 1] * mean * np.eye(40)
        wanted = weight + np.linalg.solve(gram, lacking).T @ x
        np.testing.assert_allclose(target, wanted, rtol=5e-3, atol=5e-3)
    assert len(chosen) > 1
