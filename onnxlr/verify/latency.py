"""Interleaved A/B timing, with a confidence interval of the ratio."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnxlr.limits import Limits
from onnxlr.system.session import Feed, Session

Verdict = Literal["faster", "slower", "within noise"]

_BLOCK_S = 2e-3  # one timed block lasts at least this long, far above the clock's resolution
MARGIN = 0.01  # a systematic difference between two equal sessions stays below this


@dataclass(frozen=True)
class Timing:
    """Time of one inference over the rounds of a benchmark, in milliseconds."""

    min_ms: float
    median_ms: float
    p90_ms: float


@dataclass(frozen=True)
class Comparison:
    """Two models timed in turn, in one run.

    Attributes
    ----------
    a, b : Timing
    rounds : int
    speedup : float
        Median over the rounds of time A / time B; above 1, B is faster.
    low, high : float
        95% confidence interval of that median (order statistics, no assumption on the noise).
    """

    a: Timing
    b: Timing
    rounds: int
    speedup: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """What the interval, widened by a margin of 1%, allows to say about B."""
        if self.low > 1 + MARGIN:
            return "faster"
        return "slower" if self.high < 1 - MARGIN else "within noise"


def compare_sessions(a: Session, b: Session, feed: Feed, limits: Limits) -> Comparison:
    """Time two sessions on the same feed, in turn, for about as long as the limits say."""
    return interleave(
        a.bind(feed), b.bind(feed), limits.timing_seconds, fewest=limits.timing_rounds
    )


def time_session(session: Session, feed: Feed, limits: Limits) -> Timing:
    """Time one session on a feed for about as long as the limits say."""
    run = session.bind(feed)
    count, cost = _block(run)
    rounds = _rounds(cost, limits.timing_seconds, limits.timing_rounds)
    return _timing(np.array([_time(run, count) for _ in range(rounds)]))


def interleave(
    a: Callable[[], None],
    b: Callable[[], None],
    seconds: float,
    most_rounds: int = 400,
    fewest: int = 21,
) -> Comparison:
    """Time two functions in alternating order (AB, BA, AB, …), after a warm-up of both.

    Parameters
    ----------
    a, b : callable
    seconds : float
        Rough length of the whole run.
    most_rounds : int
    fewest : int
        Rounds that are made however long they take.
    """
    count_a, cost_a = _block(a)
    count_b, cost_b = _block(b)
    rounds = min(_rounds(cost_a + cost_b, seconds, fewest), most_rounds)
    times = np.empty((rounds, 2))
    for i in range(rounds):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            times[i, side] = _time((a, b)[side], (count_a, count_b)[side])
    ratios = times[:, 0] / times[:, 1]
    low, high = median_interval(ratios)
    return Comparison(
        _timing(times[:, 0]),
        _timing(times[:, 1]),
        rounds,
        float(np.median(ratios)),
        low,
        high,
    )


def median_interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    """95% confidence interval of the median, from order statistics: no assumption on the noise.

    Examples
    --------
    >>> median_interval(np.arange(100.0))
    (40.0, 59.0)
    """
    ordered, n = np.sort(samples), len(samples)
    reach = 0.98 * math.sqrt(n)  # half-width in ranks: 1.96 standard deviations of a binomial
    low = ordered[max(0, math.floor(n / 2 - reach))]
    high = ordered[min(n - 1, math.ceil(n / 2 + reach) - 1)]
    return float(low), float(high)


def _block(run: Callable[[], None]) -> tuple[int, float]:
    """Warm up; how many runs fill a block, and how long the block lasts in seconds."""
    run()
    run()
    once = min(_time(run, 1) for _ in range(3)) / 1e3
    count = max(1, math.ceil(_BLOCK_S / max(once, 1e-7)))
    return count, once * count


def _rounds(cost: float, seconds: float, fewest: int) -> int:
    return max(fewest, min(2000, round(seconds / max(cost, 1e-9))))


def _time(run: Callable[[], None], count: int) -> float:
    """Milliseconds of one run, averaged over ``count`` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) * 1e3 / count


def _timing(ms: NDArray[np.float64]) -> Timing:
    return Timing(float(ms.min()), float(np.median(ms)), float(np.quantile(ms, 0.9)))
