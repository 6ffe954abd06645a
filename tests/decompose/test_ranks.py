"""Rank rules: what the user may write, and what a spectrum gives."""

import ml_dtypes
import numpy as np
import pytest

from onnxlr.decompose import parse_rank, singular_values, tail_error
from onnxlr.decompose.ranks import rank_for_error, storage_precision
from onnxlr.errors import UsageError

VALUES = np.array([[4.0, 2.0, 1.0, 0.5]])


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("3", 3),
        ("99", 4),
        ("0.5", 2),
        ("1.0", 4),
        ("0.01", 1),
        ("energy:0.75", 1),
        ("energy:0.76", 2),
        ("energy:1.0", 4),
        ("energy:0.98", 3),
        ("exact", 4),
    ],
)
def test_rules(text: str, rank: int) -> None:
    assert parse_rank(text).select(VALUES, 4, 9, 1e-6) == rank
    assert str(parse_rank(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-3",
        "1.5",
        "energy:2",
        "energy:0",
        "abc",
        "8,4,2,1",
        "",
        "nan",
        "energy:",
        "5:3",
        "inf",
        ".",
        "energy",
    ],
)
def test_what_is_no_rank(text: str) -> None:
    with pytest.raises(UsageError, match="is not a rank: give auto"):
        parse_rank(text)


def test_groups_share_the_rank_of_their_joint_tail() -> None:
    values = np.array([[3.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(tail_error(values), [1, np.sqrt(16 / 34), 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_numerical_rank_sees_through_storage(dtype: str, scale: float) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 7)) @ rng.standard_normal((7, 96))
    stored = (scale * matrix).astype(kind)
    values = singular_values(stored[None])
    assert rank_for_error(values, storage_precision(kind)) == 7


def test_zero_weights_have_rank_0() -> None:
    assert parse_rank("exact").select(np.zeros((1, 4)), 4, 9, 1e-6) == 0


def test_extreme_scales_stay_in_range() -> None:
    np.testing.assert_allclose(tail_error(VALUES * 1e-200), tail_error(VALUES))
    np.testing.assert_allclose(tail_error(VALUES * 1e200), tail_error(VALUES))


def test_a_pair_names_a_rank_for_each_component() -> None:
    rule = parse_rank("3,2")
    assert str(rule) == "3,2"
    assert [rule.of_full(4, component) for component in (0, 1)] == [3, 2]
    assert [parse_rank("3").of_full(4, component) for component in (0, 1)] == [3, 3]
