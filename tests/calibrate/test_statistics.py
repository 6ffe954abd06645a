"""Moments of rows that came in several sets are those of all rows."""

import numpy as np
import pytest

from onnxlr.calibrate.statistics import RunningSums, Statistics, merge_statistics
from onnxlr.types import Array


def rows_of(count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, count, 4)) * [1, 2, 3, 4] + seed


def statistics(rows: Array) -> Statistics:
    centred = rows - rows.mean(axis=1, keepdims=True)
    covariance = centred.swapaxes(1, 2) @ centred / rows.shape[1]
    return Statistics(rows.mean(axis=1), covariance, rows.shape[1])


@pytest.mark.parametrize(("first", "second"), [(30, 30), (200, 7), (1, 50)])
def test_two_sets_are_merged_to_one(first: int, second: int) -> None:
    a, b = rows_of(first, 1), rows_of(second, 5)
    merged, whole = merge_statistics(statistics(a), statistics(b)), statistics(np.hstack([a, b]))
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-10)
    assert merged.rows == whole.rows


def test_running_sums_are_those_of_all_rows_and_of_pairs() -> None:
    sizes = (40, 3000, 9)
    parts = [rows_of(count, i) for i, count in enumerate(sizes)]
    others = [rows_of(count, i + 5) for i, count in enumerate(sizes)]
    sums, pairs = RunningSums(2, 4), RunningSums(2, 4, paired=True)
    for rows, other in zip(parts, others, strict=True):
        sums.collect(rows.copy(), None)
        pairs.collect(rows.copy(), other.copy())
    whole, beside = np.hstack(parts), np.hstack(others)
    expected = statistics(whole)
    for found in (sums.statistics(), pairs.statistics()):
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-3, atol=1e-3)
    mean, cross = pairs.cross_moments()
    np.testing.assert_allclose(mean, beside.mean(axis=1), rtol=1e-6)
    centred = [a - a.mean(axis=1, keepdims=True) for a in (beside, whole)]
    products = centred[0].swapaxes(1, 2) @ centred[1] / whole.shape[1]
    np.testing.assert_allclose(cross, products, rtol=1e-3, atol=1e-2)
