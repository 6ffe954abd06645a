"""Which of low rank, what is done behind it, both and neither is best, in a sentence."""

import pytest

from onnxlr.plan.combined import Combination, best_of
from onnxlr.verify.promise import compared, make_promise

WHAT = ("as it is", "low rank", "int8-dynamic", "low rank, then int8-dynamic")
LIMIT = make_promise("top1", 0.01, None, "pairs", 1000)


def rows(ms: list[float], why: dict[int, str] | None = None) -> list[Combination]:
    sizes = (1000, 600, 260, 160)
    return [
        Combination(WHAT[i], 0.0, None, t, ms[0] / t, sizes[i], (why or {}).get(i, ""))
        for i, t in enumerate(ms)
    ]


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        ([1.0, 1.2, 1.1, 1.3], "neither: the model as it is is the fastest within 1.0 pp"),
        ([1.0, 0.5, 0.8, 0.4], f"both: {WHAT[3]} is the fastest within 1.0 pp (2.50× as fast, 16%"),
        ([1.0, 0.5, 0.8, 0.496], "low rank alone is the fastest within 1.0 pp (2.00× as fast, 60%"),
        ([1.0, 0.9, 0.5, 0.7], "int8-dynamic alone is the fastest within 1.0 pp (2.00× as fast, "),
    ],
)
def test_the_fastest_and_of_equals_the_one_to_which_less_was_done(
    ms: list[float], words: str
) -> None:
    assert best_of("int8-dynamic", rows(ms), LIMIT).startswith(words)


def test_what_is_outside_the_limit_is_not_the_best() -> None:
    found = best_of("int8-dynamic", rows([1.0, 0.5, 0.8, 0.4], {3: "too much"}), LIMIT)
    assert found == (
        "low rank alone is the fastest within 1.0 pp (2.00× as fast, 60% of the bytes); "
        f"{WHAT[3]} isn't within the limit: too much"
    )


def test_bytes_count_where_they_are_the_target_and_a_limit_is_named_if_there_is_one() -> None:
    found = best_of("int8-dynamic", rows([1.0, 0.5, 0.8, 0.9]), compared("top1"), sized=True)
    assert found == f"both: {WHAT[3]} is the smallest (1.11× as fast, 16% of the bytes)"
