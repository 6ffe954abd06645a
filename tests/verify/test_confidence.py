"""What samples show of a loss, against slow oracles: enumeration, other formulas, simulation."""

import math
from functools import cache

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxlr.p_values import mean_p_value, pairs_p_value, share_p_value
from onnxlr.verify.confidence import (
    Kind,
    Losses,
    highest_confidence,
    samples_needed,
)

CONFIDENCE = 0.95


def pairs(lost: int, won: int, n: int) -> Losses:
    values = np.repeat([1.0, -1.0, 0.0], [lost, won, n - lost - won])
    return Losses("pairs", np.random.default_rng(0).permutation(values))


def shares(count: int, n: int) -> Losses:
    return Losses("shares", np.repeat([1.0, 0.0], [count, n - count]))


@cache
def likelihood_score(lost: int, won: int, n: int, limit: float) -> float:
    """The score statistic with the restricted estimate looked for on a fine grid."""
    q = np.linspace(max(0.0, -limit), (1 - limit) / 2, 20_001)
    counts = (lost, q + limit), (won, q), (n - lost - won, 1 - 2 * q - limit)
    likelihood = sum(k * np.log(np.maximum(share, 1e-300)) for k, share in counts)
    best = q[int(np.argmax(likelihood))]
    return float((lost - won - n * limit) / math.sqrt(n * (2 * best + limit - limit**2)))


def enumerated(lost: int, won: int, n: int, limit: float, won_share: float) -> float:
    """Probability of all outcomes with no larger a score, one by one."""
    most = likelihood_score(lost, won, n, limit) + 1e-5
    shares = (won_share + limit, won_share, 1 - 2 * won_share - limit)
    total = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            if likelihood_score(b, c, n, limit) <= most:
                total += float(scipy.stats.multinomial.pmf((b, c, n - b - c), n, shares))
    return total


@pytest.mark.parametrize(
    ("lost", "won", "n", "limit"),
    [(0, 0, 12, 0.1), (1, 2, 14, 0.1), (0, 3, 12, 0.05), (4, 1, 10, 0.3), (2, 2, 11, -0.05)],
)
def test_pairs_are_tested_as_by_enumeration(lost: int, won: int, n: int, limit: float) -> None:
    changed = scipy.stats.binomtest(lost + won, n).proportion_ci(1 - 1e-6, "exact")
    low, high = max(0.0, -limit, (changed.low - limit) / 2), (min(changed.high, 1.0) - limit) / 2
    oracle = max(enumerated(lost, won, n, limit, q) for q in np.linspace(low, high, 25))
    assert pairs_p_value(lost, won, n, limit) == pytest.approx(oracle, rel=0.01, abs=2e-6)


def test_pairs_count_lost_ones_against_won_ones() -> None:
    """Swapped, a model that gains would be refused and one that loses handed over."""
    assert pairs(5, 25, 1000).shows(0.005, CONFIDENCE)
    assert not pairs(25, 5, 1000).shows(0.005, CONFIDENCE)
    assert pairs(25, 5, 1000).mean == pytest.approx(0.02)


def test_a_test_of_pairs_is_one_sided() -> None:
    """At one side the whole 5% lie: two-sided, this outcome would show nothing."""
    p = pairs(3, 4, 400).p_value(0.01)
    assert 0.025 < p < 0.05


@pytest.mark.parametrize(("n", "limit"), [(75, 0.01), (300, 0.01), (30, 0.05)])
def test_without_loss_it_is_a_power(n: int, limit: float) -> None:
    expected = (1 - limit) ** n
    assert pairs(0, 0, n).p_value(limit) == pytest.approx(expected, rel=1e-3)
    assert shares(0, n).p_value(limit) == pytest.approx(expected, rel=1e-12)


def test_how_many_samples_show_the_limit_of_a_model_without_loss() -> None:
    assert samples_needed(0.0, 0.01, 0.95) == 299
    assert shares(0, 299).shows(0.01, 0.95)
    assert not shares(0, 298).shows(0.01, 0.95)  # one fewer shows less
    assert highest_confidence("pairs", 75, 0.01) == pytest.approx(0.5294, abs=1e-4)
    assert highest_confidence("shares", 75, 0.01) == pytest.approx(0.5294, abs=1e-4)


@pytest.mark.parametrize("n", [40, 400])
def test_pairs_at_the_limit_are_seldom_accepted(n: int) -> None:
    """Where the true loss is the limit, the test errs in no more than 5% of all samples."""
    limit, rng, errors = 0.05, np.random.default_rng(n), []
    for won in (0.0, 0.02, 0.1):
        draws = rng.multinomial(n, (won + limit, won, 1 - 2 * won - limit), size=400)
        errors.append(np.mean([pairs(b, c, n).shows(limit, 0.95) for b, c, _ in draws]))
    assert max(errors) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert max(errors) > 0.015  # and isn't far from them: else it would waste samples


@given(st.integers(1, 400), st.data(), st.floats(0.6, 0.999))
@settings(max_examples=60, deadline=None)
def test_bounds_of_shares_are_those_of_clopper_and_pearson(
    n: int, data: st.DataObject, confidence: float
) -> None:
    count = data.draw(st.integers(0, n))
    losses = shares(count, n)
    upper = scipy.stats.beta.ppf(confidence, count + 1, n - count) if count < n else 1.0
    lower = scipy.stats.beta.ppf(1 - confidence, count, n - count + 1) if count else 0.0
    assert losses.at_most(confidence) == pytest.approx(upper, abs=2e-4)
    assert losses.at_least(confidence) == pytest.approx(lower, abs=2e-4)


def slow_p_value(values: np.ndarray, limit: float, confidence: float) -> float:
    """The bets one after the other, each staked on what came before."""
    capital, most, n = 1.0, 1.0, len(values)
    total = squares = 0.0
    for i, value in enumerate(values):
        variance = (0.01 + squares) / (i + 1)
        stake = math.sqrt(2 * math.log(1 / (1 - confidence)) / (n * variance))
        capital *= 1 + min(stake, 0.99 / (1 - limit)) * (limit - value)
        most = max(most, capital)
        total += value
        squares += (value - total / (i + 1)) ** 2
    return 1 / most


@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.floats(0.01, 0.9), st.floats(0.5, 0.99))
@settings(max_examples=60, deadline=None)
def test_bets_are_laid_one_after_the_other(
    seed: int, n: int, limit: float, confidence: float
) -> None:
    values = np.random.default_rng(seed).beta(1, 8, n)
    expected = slow_p_value(values, limit, confidence)
    assert mean_p_value(values, limit, confidence) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(0.2, 4.8), (2.0, 48.0), (20.0, 480.0)])
def test_bets_on_the_limit_are_seldom_won(shape: tuple[float, float]) -> None:
    """The mean is 4%; tails are long, usual and short."""
    rng = np.random.default_rng(1)
    won = [mean_p_value(rng.beta(*shape, 150), 0.04, 0.95) <= 0.05 for _ in range(1000)]
    assert np.mean(won) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_errors_well_within_the_limit_are_shown_by_few() -> None:
    rng = np.random.default_rng(2)
    losses = Losses("errors", rng.gamma(4, 0.001, 60)).bounded(0.01, "errors")  # about 0.004
    assert losses.shows(0.01, 0.95)
    assert not losses.shows(losses.mean, 0.95)
    assert losses.at_least(0.95) < losses.mean < losses.at_most(0.95) < 0.01


def test_errors_near_the_limit_are_shown_by_many_that_are_alike() -> None:
    rng = np.random.default_rng(2)
    values = rng.gamma(4, 0.00215, 240)  # 0.0086 on average
    assert Losses("errors", values).bounded(0.01, "errors").shows(0.01, 0.95)
    # Where the same model was seen to lose much of another sample, they show less.
    other = Losses("errors", np.array([0.004, 0.3]))
    assert not Losses("errors", values).beside(other).bounded(0.01, "errors").shows(0.01, 0.95)


def test_relative_errors_are_tested_by_their_squares() -> None:
    rng = np.random.default_rng(3)
    squares = rng.gamma(4, 0.25, 80) * 0.03**2
    losses = Losses("errors", squares, 2).bounded(0.05, "errors")
    assert losses.reach == pytest.approx(10 * 0.05**2)
    assert losses.mean == pytest.approx(math.sqrt(squares.mean()))
    assert losses.shows(0.05, 0.95)
    assert not losses.shows(0.03, 0.95)
    assert losses.at_least(0.95) < losses.mean < losses.at_most(0.95) < 0.05


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("n", [12, 40, 240])
def test_errors_at_the_limit_are_seldom_taken_for_less(n: int, spread: float) -> None:
    """Lognormal errors of mean 1, with tails from short to very long, and others to choose by."""
    rng = np.random.default_rng(4)

    def draw() -> Losses:
        return Losses("errors", rng.lognormal(-(spread**2) / 2, spread, n))

    wrong = [draw().beside(draw()).bounded(1.0, "errors").shows(1.0, 0.95) for _ in range(200)]
    assert np.mean(wrong) <= 0.05


@pytest.mark.parametrize("share", [20, 50, 100])
def test_rare_errors_that_are_large_are_thought_of(share: int) -> None:
    """One sample of so many loses half of all: the limit, as the mean of so many times it."""
    rng = np.random.default_rng(5)
    n = 240

    def draw() -> Losses:
        usual = rng.lognormal(math.log(0.5) - 0.125, 0.5, n)
        return Losses("errors", usual + np.where(rng.random(n) < 1 / share, share / 2, 0.0))

    wrong = [draw().beside(draw()).bounded(1.0, "errors").shows(1.0, 0.95) for _ in range(200)]
    assert np.mean(wrong) <= 0.05


@pytest.mark.parametrize(
    ("largest", "seen", "limit", "most", "reach"),
    [
        (0.02, 0.0, 0.01, math.inf, 0.1),  # ten times the limit
        (0.2, 0.0, 0.01, math.inf, 0.4),  # twice what was seen
        (0.2, 0.3, 0.01, math.inf, 0.6),
        (0.2, 0.6, 0.01, 1.0, 1.0),  # nothing loses more than all
        (0.09, 0.0, math.inf, math.inf, 0.5),  # ten times the mean, where there is no limit
    ],
)
def test_what_a_sample_may_err_is_bounded(
    largest: float, seen: float, limit: float, most: float, reach: float
) -> None:
    losses = Losses("errors", np.array([0.01, largest]), seen=seen, most=most)
    assert losses.bounded(limit, "errors").reach == pytest.approx(reach)


@pytest.mark.parametrize("n", [60, 150, 600])
@pytest.mark.parametrize("kind", ["usual", "rare", "both ways"])
def test_a_limit_of_differences_is_seldom_shown_wrongly(kind: str, n: int) -> None:
    """The true loss is the limit. Where few samples lose much, bolder models have lost it too."""
    rng = np.random.default_rng(12)

    def shown() -> bool:
        if kind == "usual":
            losses = Losses("differences", rng.beta(0.5, 49.5, n))
        elif kind == "rare":
            losses = Losses("differences", np.where(rng.random(n) < 0.02, 0.5, 0.0), seen=0.5)
        else:
            losses = Losses("differences", rng.normal(0.01, 0.05, n))
        return losses.bounded(0.01, None).shows(0.01, 0.95)

    wrong = np.mean([shown() for _ in range(1000)])
    assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_small_differences_need_few_samples() -> None:
    """Eighty windows that each lose a little show something; by the bound of 1 they don't."""
    losses = Losses("differences", np.random.default_rng(13).normal(0.0005, 0.002, 80))
    confidence = highest_confidence("differences", 80, 0.01)
    assert confidence == pytest.approx(0.6468, abs=1e-4)
    assert losses.bounded(0.01, None).shows(0.01, confidence)
    assert not losses.shows(0.01, confidence)
    assert highest_confidence("differences", 230, 0.01) >= 0.95
    assert highest_confidence("differences", 210, 0.01) < 0.95


@pytest.mark.parametrize("n", [25, 50, 100])
def test_few_samples_do_not_end_in_nothing(n: int) -> None:
    """At the usual confidence, what loses a fifth of the limit and scatters mostly passes."""
    rng = np.random.default_rng(17)
    confidence = highest_confidence("differences", n, 0.01)
    passed = [
        Losses("differences", rng.normal(0.002, 0.02, n))
        .bounded(0.01, None)
        .shows(0.01, confidence)
        for _ in range(200)
    ]
    assert np.mean(passed) > 0.75


@pytest.mark.parametrize("kind", ["errors", "differences"])
def test_at_half_a_confidence_means_are_compared(kind: Kind) -> None:
    """Five pages of 25 lose something: whether that is too much, the mean decides."""
    assert highest_confidence(kind, 3, 0.01) >= 0.5
    power = 2 if kind == "errors" else 1
    for loss, within in ((0.0099, True), (0.0101, False)):
        values = np.repeat([0.0, 5 * loss**power], [20, 5])
        losses = Losses(kind, values, power=power).bounded(0.01, None)
        assert losses.mean == pytest.approx(loss)
        assert losses.shows(0.01, 0.5) == within
        assert (losses.needed(0.01, 0.5) == 1) == within
        assert losses.at_most(0.5) == pytest.approx(loss, rel=0.02)
        assert not losses.shows(0.01, 0.95)


def test_errors_that_have_an_end_are_shown_by_it() -> None:
    """Shares of wrong answers: none is above 1, so that 50 samples bound a mean of any size."""
    values = np.random.default_rng(3).beta(1, 4, 50)  # of mean 0.2

    def shares(values: NDArray[np.float64]) -> Losses:
        return Losses("errors", values, most=1.0).bounded(0.3, "errors")

    assert shares(values).p_value(0.3, 0.95) == mean_p_value(values, 0.3, 0.95)
    assert shares(values).mean < shares(values).at_most(0.95) < 0.35
    assert shares(values).shows(0.35, 0.95)
    assert not Losses("errors", values).bounded(0.3, "errors").shows(0.35, 0.95)
    assert shares(np.ones(4)).at_most(0.95) == 1.0
    draws = [np.random.default_rng(seed).beta(1, 4, 50) for seed in range(400)]
    wrong = np.mean([shares(d).at_most(0.9) < 0.2 for d in draws])
    assert wrong <= 0.1 + 2 * math.sqrt(0.09 / 400)


@pytest.mark.parametrize(
    ("largest", "seen", "scale", "reach"),
    [
        (0.02, 0.0, 1.0, 0.25),  # 25 times the limit
        (0.02, 0.0, 2.0, 0.125),  # the limit is half as much of the scale
        (0.2, 0.0, 1.0, 0.4),  # twice what was seen
        (0.2, 0.3, 1.0, 0.6),
        (0.2, 0.6, 1.0, 1.0),  # nothing loses more than all
    ],
)
def test_what_a_sample_may_lose_is_bounded(
    largest: float, seen: float, scale: float, reach: float
) -> None:
    losses = Losses("differences", np.array([0.01, -largest]), scale=scale, seen=seen)
    assert losses.bounded(0.01, None).reach == pytest.approx(reach)


def test_a_model_that_loses_nothing_is_tested_as_the_metric_says() -> None:
    nothing = Losses("pairs", np.zeros(60))
    assert nothing.bounded(0.01, "pairs") is nothing
    assert nothing.bounded(0.01, "differences").kind == "differences"
    errors = Losses("errors", np.zeros(60)).bounded(math.inf, "errors")
    assert errors.at_least(0.95) == 0 <= errors.at_most(0.95) < 1e-4


@given(st.integers(0, 2**32 - 1), st.integers(5, 200), st.floats(0.55, 0.99))
@example(1, 5, 0.55)  # the bound is far nearer to the mean than the first step that is beyond it
@settings(max_examples=12, deadline=None)
def test_bounds_are_where_the_test_turns(seed: int, n: int, confidence: float) -> None:
    rng = np.random.default_rng(seed)
    for losses in (
        Losses("errors", rng.gamma(2, 0.01, n)).bounded(0.05, None),
        Losses("errors", rng.gamma(2, 0.01, n), 2).bounded(math.inf, None),
        Losses("differences", np.clip(rng.normal(0.02, 0.2, n), -1, 1)),
        Losses("differences", np.clip(rng.normal(0.02, 0.2, n), -1, 1), scale=20.0),
        Losses("differences", rng.normal(0.002, 0.02, n)).bounded(0.01, None),
        Losses("pairs", rng.choice([-1.0, 0.0, 1.0], n)),
    ):
        upper = losses.at_most(confidence)
        assert upper >= losses.mean - 1e-12
        assert losses.at_least(confidence) <= losses.mean + 1e-12
        width = 1e-3 * max(abs(upper), losses.scale * 0.01)
        if losses.mean + width < upper < losses.scale and math.isfinite(upper):
            assert losses.shows(upper + width, confidence)
            assert not losses.shows(upper - width, confidence)


@pytest.mark.parametrize(("power", "scale"), [(1, 1.0), (1, 3.0), (2, 1.0)])
def test_noise_is_the_spread_of_the_loss_of_other_samples(power: int, scale: float) -> None:
    rng = np.random.default_rng(14)
    draws = [Losses("errors", rng.gamma(4, 0.001, 200), power, scale) for _ in range(1500)]
    spread = np.std([losses.mean for losses in draws])
    assert np.mean([losses.noise for losses in draws]) == pytest.approx(spread, rel=0.08)


def test_a_scale_is_a_unit() -> None:
    values = np.clip(np.random.default_rng(4).normal(0.01, 0.1, 500), -1, 1)
    plain, scaled = Losses("differences", values), Losses("differences", values, scale=30.0)
    assert scaled.mean == pytest.approx(30 * plain.mean)
    assert scaled.p_value(30 * 0.03) == plain.p_value(0.03)
    assert scaled.at_most(0.9) == pytest.approx(30 * plain.at_most(0.9), rel=1e-3)


@pytest.mark.parametrize("kind", ["pairs", "shares", "errors", "differences"])
def test_half_a_confidence_is_about_the_figure_itself(kind: str) -> None:
    rng = np.random.default_rng(5)
    values = {
        "pairs": np.repeat([1.0, -1.0, 0.0], [60, 40, 4900]),
        "shares": np.repeat([1.0, 0.0], [20, 4980]),
        "errors": rng.gamma(4, 0.001, 5000),
        "differences": np.clip(rng.normal(0.004, 0.05, 5000), -1, 1),
    }[kind]
    losses = Losses(kind, rng.permutation(values))  # type: ignore[arg-type]
    assert losses.at_most(0.5) == pytest.approx(losses.mean, rel=0.35)


def test_about_so_many_samples_are_needed() -> None:
    """With as many of the same kind as it says, the limit is shown in about half of the cases."""
    rng = np.random.default_rng(6)
    needed = pairs(30, 25, 1000).needed(0.015, 0.95)
    assert needed is not None
    shown = [
        pairs(b, c, needed).shows(0.015, 0.95)
        for b, c, _ in rng.multinomial(needed, (0.03, 0.025, 0.945), size=200)
    ]
    assert 0.35 < np.mean(shown) < 0.7
    values = rng.gamma(2, 0.0035, 100)
    needed = Losses("errors", values).needed(0.01, 0.95)
    assert needed is not None
    shown = [Losses("errors", rng.choice(values, needed)).shows(0.01, 0.95) for _ in range(200)]
    assert 0.2 < np.mean(shown) < 0.8
    assert pairs(30, 5, 1000).needed(0.01, 0.95) is None
    assert shares(0, 10).needed(0.01, 0.95) == 299


@pytest.mark.parametrize(
    ("lost", "won", "count"),
    [(1, 0, 150), (1, 0, 300), (1, 1, 300), (2, 0, 600), (3, 0, 1000), (3, 3, 600), (12, 0, 3000)],
)
def test_where_few_lose_no_number_is_named_that_would_not_show_it(
    lost: int, won: int, count: int
) -> None:
    """The normal approximation named 299 samples where 300, or 600, had just failed to show it."""
    found = pairs(lost, won, count)
    needed = found.needed(0.01, 0.95)
    assert needed is not None
    assert found.shows(0.01, 0.95) == (needed <= count)
    more = round(1.2 * needed)
    assert pairs(round(lost * more / count), round(won * more / count), more).shows(0.01, 0.95)


@pytest.mark.parametrize("kind", ["pairs", "shares", "errors", "differences"])
def test_as_many_samples_would_show_what_these_do(kind: str) -> None:
    """By the samples that choose it is judged what as many others would show."""
    rng = np.random.default_rng(11)
    values = {
        "pairs": np.repeat([1.0, -1.0, 0.0], [6, 4, 990]),
        "shares": np.repeat([1.0, 0.0], [4, 996]),
        "errors": rng.gamma(4, 0.001, 1000),
        "differences": rng.choice([0.01, -0.01, 0.0], 1000, p=[0.3, 0.1, 0.6]),
    }[kind]
    losses = Losses(kind, rng.permutation(values)).bounded(0.01, None)  # type: ignore[arg-type]
    bound = losses.at_most(0.95)
    below, above = losses.mean + 0.6 * (bound - losses.mean), losses.mean + 2 * bound
    assert losses.would_show(1000, above, 0.95)
    assert not losses.would_show(1000, below, 0.95)
    assert losses.would_show(100_000, below, 0.95)
    assert not losses.would_show(100_000, 0.9 * losses.mean, 0.95)
    needed = losses.needed(above, 0.95)
    assert needed is not None
    assert losses.would_show(round(1.1 * needed), above, 0.95)
    assert not losses.would_show(round(0.7 * needed), above, 0.95)


def test_nothing_is_shown_of_no_loss_at_all() -> None:
    assert share_p_value(0, 10_000, 0.0) == 1.0
    assert pairs_p_value(0, 0, 1000, 0.0) > 0.4
    assert Losses("errors", np.zeros(100)).p_value(0.0) == 1.0
    assert share_p_value(3, 3, 1.0) == 0.0
