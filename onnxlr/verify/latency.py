"""Interleaved A/B timing that goes on until it is decided, with an interval of the ratio."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnxlr.limits import Limits
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.verify.rounds import BUSY, Rounds, Run, has_fine_processor_clock

Verdict = Literal["faster", "slower", "within noise"]

MARGIN = 0.01  # a systematic difference between two equal sessions stays below this
PRECISION = 0.02  # relative half-width at which the interval of two whole models is narrow

# Whoever looks at an interval again and again, until it says something, is wrong more often than
# it says. Looks are few, at doubling numbers of rounds, and share the error of 5% (Bonferroni):
# what the last one says holds at 95% whichever it was. Nine is the fewest rows whose least and
# largest ratio bound a median with so small an error.
_FIRST_LOOK, _LOOKS = 9, 10
LEVEL = 0.05 / _LOOKS
_ROWS_IN_TURN = 4 * _FIRST_LOOK  # of several models, after which their medians are known well
_ENOUGH = 1 / 3  # of the time: after it, how much faster need not be known well


@dataclass(frozen=True)
class Timing:
    """Time of one inference over the rounds of a benchmark, in milliseconds.

    Attributes
    ----------
    min_ms : float
    median_ms : float
        What is compared: the median over the groups of rounds of the best in each. Of the second
        of two models it is the first's over their ratio.
    p90_ms : float
        The slow end of all rounds on the clock on the wall, waits for other processes included.
    """

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
        Median over the groups of rounds of time A / time B, the best of each; above 1, B is faster.
        It is the ratio of the medians in ``a`` and ``b``.
    low, high : float
        95% confidence interval of that median (order statistics, no assumption on the noise),
        which holds for a run that was stopped because of what it saw.
    settled : bool
        Whether the interval got narrow enough to decide, and to be kept.
    busy : float
        Share of the time that was spent waiting for other processes.
    """

    a: Timing
    b: Timing
    rounds: int
    speedup: float
    low: float
    high: float
    settled: bool = True
    busy: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """What the interval, widened by a margin of 1%, allows to say about B."""
        if self.low > 1 + MARGIN:
            return "faster"
        return "slower" if self.high < 1 - MARGIN else "within noise"

    @property
    def undecided(self) -> bool:
        """Whether B may be faster, slower or neither."""
        return self.verdict == "within noise" and not self.settled

    @property
    def doubt(self) -> str:
        """Why nothing is decided, as the end of a sentence; empty if it is."""
        return f", which decides nothing: {busy_words(self.busy)}" if self.undecided else ""


Settled = Callable[[float, float], bool]  # whether an interval of the ratio decides


def compare_sessions(a: Session, b: Session, feed: Feed, limits: Limits) -> Comparison:
    """Time two sessions on the same feed, in turn, until it is decided or the time is up."""
    return interleave(
        a.bind(feed),
        b.bind(feed),
        decides(PRECISION),
        limits.timing_seconds,
        limits.timing_rows,
        least_seconds=limits.timing_seconds_least,
        by_processor=runs_in_caller(a.machine),
    )


def time_session(session: Session, feed: Feed, limits: Limits) -> Timing:
    """Time one session on a feed, until its time is known well or the time is up."""
    rounds = Rounds([session.bind(feed)], by_processor=runs_in_caller(session.machine))
    _repeat(
        rounds,
        lambda best, _: _half_width(*median_interval(best[:, 0], LEVEL)) <= PRECISION,
        limits.timing_seconds,
        limits.timing_rows,
        limits.timing_seconds_least,
    )
    return _timing(rounds, 0, float(np.median(rounds.best[:, 0])))


def times_in_turn(sessions: Sequence[Session], feed: Feed, seconds: float) -> list[float]:
    """Median milliseconds of each of some sessions on the same feed, timed in turn.

    Parameters
    ----------
    sessions : sequence of Session
        Of one machine.
    feed : mapping of str to ndarray
    seconds : float
        For all of them, at most; but as many rounds are made as a first look needs.
    """
    alone = runs_in_caller(sessions[0].machine)
    rounds = Rounds([session.bind(feed) for session in sessions], by_processor=alone)
    start = time.perf_counter()
    while rounds.rows < _FIRST_LOOK or (
        rounds.rows < _ROWS_IN_TURN and time.perf_counter() - start < seconds
    ):
        rounds.add_row()
    return [float(ms) for ms in np.median(rounds.best, axis=0)]


def interleave(
    a: Run,
    b: Run,
    settled: Settled,
    seconds: float,
    rows: int = _FIRST_LOOK,
    *,
    least_seconds: float = 0.0,
    by_processor: bool = False,
) -> Comparison:
    """Time two functions in alternating order (AB, BA, AB, …), until it is decided.

    Parameters
    ----------
    a, b : callable
    settled : callable
        Whether an interval decides: ``decides`` and ``decides_gain`` make such functions.
    seconds : float
        After which it ends undecided; after a third of it, it ends if the second is faster for
        sure, even if by how much isn't known well.
    rows : int
        Rows of rounds that are made however long they take, if nothing is decided before.
    least_seconds : float
        Before which it doesn't end.
    by_processor : bool
        Whether the functions run in the calling thread alone: its time on the processor counts.
    """
    rounds = Rounds([a, b], by_processor=by_processor)

    def interval(best: NDArray[np.float64]) -> tuple[float, float]:
        return median_interval(best[:, 0] / best[:, 1], LEVEL)

    def decided(best: NDArray[np.float64], spent: float) -> bool:
        low, high = interval(best)
        return settled(low, high) or (low > 1 + MARGIN and spent > _ENOUGH * seconds)

    _repeat(rounds, decided, seconds, rows, least_seconds)
    best = rounds.best
    before, speedup = float(np.median(best[:, 0])), float(np.median(best[:, 0] / best[:, 1]))
    low, high = interval(best)
    return Comparison(
        _timing(rounds, 0, before),
        _timing(rounds, 1, before / speedup),
        rounds.count,
        speedup,
        low,
        high,
        settled(low, high),
        rounds.busy,
    )


def decides(precision: float) -> Settled:
    """Whether an interval tells faster, slower and equal apart, and how much faster."""

    def settled(low: float, high: float) -> bool:
        if high < 1 - MARGIN or (low >= 1 - MARGIN and high <= 1 + MARGIN):
            return True
        # On the border between two verdicts no interval ever decides: there it has to be narrower.
        return _half_width(low, high) <= (precision if low > 1 + MARGIN else MARGIN / 2)

    return settled


def decides_gain(precision: float) -> Settled:
    """Whether an interval tells what is faster from what isn't, and how much faster."""

    def settled(low: float, high: float) -> bool:
        if high <= 1 + MARGIN:
            return True
        return _half_width(low, high) <= (precision if low > 1 + MARGIN else MARGIN)

    return settled


def median_interval(samples: NDArray[np.float64], level: float = 0.05) -> tuple[float, float]:
    """Confidence interval of the median, from order statistics: no assumption on the noise.

    Parameters
    ----------
    samples : ndarray of shape (n,)
    level : float
        How often it may miss the median, at most. With few samples it is from the least to the
        largest, and misses more often.

    Examples
    --------
    >>> median_interval(np.arange(100.0))
    (39.0, 60.0)
    """
    ordered, cut = np.sort(samples), _cut(len(samples), level)
    return float(ordered[cut]), float(ordered[-1 - cut])


@functools.cache
def _cut(n: int, level: float) -> int:
    """How many of n samples are left out at either end: the median is among the rest."""
    missed, cut = 0.0, -1
    while cut < (n - 1) // 2:
        missed += 2 * math.exp(
            math.lgamma(n + 1) - math.lgamma(cut + 2) - math.lgamma(n - cut) - n * math.log(2)
        )  # the chance that exactly cut + 1 samples are below it, or above it
        if missed > level:
            break
        cut += 1
    return max(cut, 0)


def runs_in_caller(machine: Machine) -> bool:
    """Whether a session runs in the thread that calls it, whose processor time can be told."""
    alone = machine.provider == "cpu" and machine.threads == 1
    return alone and has_fine_processor_clock()


def busy_words(busy: float) -> str:
    """How busy the machine was, in words."""
    if busy <= BUSY:
        return "timings scattered, though no other process was in the way"
    return f"the machine was busy, timings waited {busy:.0%} of their time for other processes"


def _repeat(
    rounds: Rounds,
    decided: Callable[[NDArray[np.float64], float], bool],
    seconds: float,
    rows: int,
    least_seconds: float,
) -> None:
    """Add rounds until what is seen at one of the looks decides it, or the time is up."""
    start, looks = time.perf_counter(), [_FIRST_LOOK * 2**i for i in range(_LOOKS - 1)]
    while True:
        rounds.add_row()
        if rounds.rows < _FIRST_LOOK:
            continue
        spent = time.perf_counter() - start
        if rounds.rows in looks and spent >= least_seconds and decided(rounds.best, spent):
            return
        if rounds.rows >= rows and spent >= max(seconds, least_seconds):
            return  # to the last look


def _half_width(low: float, high: float) -> float:
    """Half the width of an interval, as a share of its middle on a logarithmic scale."""
    return math.sqrt(high / low) - 1


def _timing(rounds: Rounds, side: int, middle: float) -> Timing:
    slow = float(np.quantile(rounds.on_the_wall[:, side], 0.9))
    return Timing(float(rounds.best[:, side].min()), middle, slow)
