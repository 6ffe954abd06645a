"""What samples show of a loss: one-sided tests at a confidence, bounds, and how many it takes.

The true loss of a model is the mean of what it loses on a sample, over all that there could be.
Some samples show at a confidence that it is within a limit, if a model whose true loss is the limit
would come off so well with no more than the remaining probability.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import scipy.special
from numpy.typing import NDArray

Kind = Literal["pairs", "shares", "errors", "differences"]
Array = NDArray[np.float64]

USUAL_CONFIDENCE = 0.95
# Nothing can be shown of errors without a bound on what one sample may lose. In their test a sample
# counts at most as if its error were so many times the limit, which is the root of its loss.
WORST_ERROR = 5.0
# A difference is thought to be no larger than so many times the largest that was seen, or than the
# square of WORST_ERROR times the limit if that is more.
WORST_DIFFERENCE = 2.0
_OUTLIER_LEVEL = 1e-6  # probability that the share of changed samples is outside its interval
_NUISANCE_STEPS = 48
_MOST_STAKE = 0.99  # of all that a bet may stake, so that no single sample loses everything
_FIRST_VARIANCE = 1e-2  # of losses scaled to 0 … 1, before the first sample
_STAKES = 64  # among which the best constant one is looked for
_MOST_SAMPLES = 1 << 30  # that are thought of
_PRECISION = 1e-4  # of a bound, relative to it, or to a hundredth
_FARTHEST = 1e15  # a limit beyond which none is looked for


@dataclass(frozen=True, eq=False)
class Losses:
    """What each of n samples loses.

    Attributes
    ----------
    kind : str
        ``pairs``: 1, -1 or 0 for a sample that was right and is wrong, was wrong and is right, or
        is as before. ``shares``: 1 for a sample that changed, else 0. ``errors``: at least 0.
        ``differences``: between -1 and 1.
    values : ndarray of shape (n,)
        In an order that has nothing to do with what they are.
    power : int
        The mean of the values is the loss to this power: 2 where the loss is a relative error, and
        the values are squares.
    scale : float
        What a value of 1 is in the unit of the loss.
    seen : float
        The largest difference of a sample that other models showed: at least 0, at most 1.
    reach : float
        The largest difference that is thought possible: above 0, at most 1. Values are no larger.

    Examples
    --------
    >>> even = Losses("pairs", np.repeat([1.0, -1.0, 0.0], [3, 3, 1494]))
    >>> even.shows(0.01, 0.95), even.shows(0.002, 0.95)
    (True, False)
    """

    kind: Kind
    values: Array
    power: int = 1
    scale: float = 1.0
    seen: float = 0.0
    reach: float = 1.0

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        """The loss on these samples."""
        return self.scale * float(self.values.mean() ** (1 / self.power))

    @property
    def largest(self) -> float:
        """The largest difference of a sample."""
        return float(np.abs(self.values).max(initial=0.0))

    def bounded(self, limit: float, kind: Kind | None) -> "Losses":
        """The same, as it is tested against a limit.

        Of a metric that gives more than 0 and 1, a sample may lose 1 at most, and with that bound
        few samples show nothing: one in a hundred might lose all, and none of them be among fifty.
        So no sample is thought to lose more than some limits, or than twice what any was seen to.

        Parameters
        ----------
        limit : float
        kind : str or None
            What a sample loses by the metric. A model that loses none doesn't tell by itself.
        """
        if not len(self) or "differences" not in (self.kind, kind):
            return self
        largest = max(self.seen, self.largest)
        limits = WORST_ERROR**2 * limit / self.scale
        reach = min(1.0, max(limits, WORST_DIFFERENCE * largest))
        return replace(self, kind="differences", reach=reach)

    def p_value(self, limit: float, confidence: float = USUAL_CONFIDENCE) -> float:
        """Probability of so small a loss, at most, where the true loss is the limit or more.

        Parameters
        ----------
        limit : float
        confidence : float
            What the bets on ``errors`` and ``differences`` are laid out for. The result is valid
            for any; the one that counts makes it most powerful.
        """
        n, limit = len(self), limit / self.scale
        if self.kind == "pairs":
            lost, won = (int(np.count_nonzero(self.values == sign)) for sign in (1, -1))
            return pairs_p_value(lost, won, n, limit)
        if self.kind == "shares":
            return share_p_value(round(float(self.values.sum())), n, limit)
        return mean_p_value(*self._unit(limit), confidence)

    def shows(self, limit: float, confidence: float) -> bool:
        """Whether the samples show, at this confidence, that the true loss is below the limit."""
        return _significant(self.p_value(limit, confidence), confidence)

    def at_most(self, confidence: float) -> float:
        """The least limit that the samples show; infinity if they show none."""
        return self.scale * _boundary(
            lambda limit: self.shows(self.scale * limit, confidence),
            self.mean / self.scale,
            math.inf if self.kind == "errors" else 1.0,
            max(_PRECISION, self._first_step),
        )

    @property
    def _first_step(self) -> float:
        """About how far from the mean a bound is, in the unit of the values."""
        if self.kind == "errors":
            return self.mean / self.scale
        return 2 * float(self.values.std()) / math.sqrt(len(self))

    def at_least(self, confidence: float) -> float:
        """The largest loss that the samples show the true loss to be above."""
        if self.kind == "shares":
            return 1.0 - Losses("shares", 1.0 - self.values).at_most(confidence)
        if self.kind != "errors":
            return -replace(self, values=-self.values).at_most(confidence)

        def possible(limit: float) -> bool:
            values, share = self._unit(limit)
            return not _significant(mean_p_value(1 - values, 1 - share, confidence), confidence)

        return _boundary(possible, 0.0, self.mean) if self.mean > 0 else 0.0

    def needed(self, limit: float, confidence: float) -> int | None:
        """About how many such samples would show the limit; None if no number would."""
        gap = (limit - self.mean) / self.scale
        if gap <= 0:
            return None
        if self.kind in ("pairs", "shares"):
            noise = float(scipy.special.ndtri(confidence)) ** 2 * float(self.values.var())
            least = samples_needed(self.mean / self.scale, limit / self.scale, confidence)
            return max(math.ceil(noise / gap**2), least)
        values, share = self._unit(limit / self.scale)
        stakes = np.linspace(0, _MOST_STAKE / (1 - share), _STAKES)[1:]
        growth = float(np.log1p(np.outer(stakes, share - values)).mean(axis=1).max())
        return math.ceil(-math.log(1 - confidence) / growth) if growth > 0 else None

    def _unit(self, limit: float) -> tuple[Array, float]:
        """The values on a scale from 0 to 1, and the limit on it."""
        if self.kind == "differences":
            share = (limit / self.reach + 1) / 2
            return (self.values / self.reach + 1) / 2, min(max(share, 0.0), 1.0)
        if limit <= 0:
            return np.ones(len(self)), 0.0
        worst = WORST_ERROR**2 * limit**self.power
        return np.minimum(self.values / worst, 1.0), WORST_ERROR**-2


def _significant(p_value: float, confidence: float) -> bool:
    return p_value <= (1 - confidence) * (1 + 1e-9)


def _boundary(
    holds: Callable[[float], bool], low: float, high: float, step: float = math.inf
) -> float:
    """The least value from which on a statement holds; the upper end where it never does.

    With a step it is looked for in ever larger steps from the lower end on.
    """
    while low + step < min(high, _FARTHEST):
        if holds(low + step):
            high = low + step
            break
        low, step = low + step, 2 * step
    if math.isinf(high):
        return high
    while high - low > _PRECISION * max(abs(low), abs(high), 0.01):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@lru_cache(maxsize=4096)
def pairs_p_value(lost: int, won: int, n: int, limit: float) -> float:
    """The p-value of an exact test of paired right and wrong answers.

    The hypothesis is that the share of lost samples exceeds that of won ones by the limit or more.
    Outcomes are ordered by the score statistic (Tango 1998, Statistics in Medicine 17:891). Their
    probability hangs on the share of won samples too, and the largest is taken over all shares
    within an interval of very high confidence (Berger & Boos 1994, JASA 89:1012).

    Parameters
    ----------
    lost, won, n : int
        Samples that were right and are wrong, were wrong and are right, and all.
    limit : float
        Between -1 and 1.

    Examples
    --------
    >>> round(pairs_p_value(0, 0, 75, 0.01), 3)  # 0.99 to the power of 75
    0.471
    """
    if limit >= 1:
        return 0.0
    if limit <= -1:
        return 1.0
    changed = np.arange(n + 1)
    observed = float(_score(np.array(float(lost)), np.array(float(won)), n, limit))
    most_lost = _most_lost(changed, n, limit, observed + 1e-9)
    low, high = _share_interval(lost + won, n)
    least = max(0.0, -limit)
    won_shares = np.linspace(
        max(least, (low - limit) / 2),
        max(least, min((1 - limit) / 2, (high - limit) / 2)),
        _NUISANCE_STEPS,
    )
    return min(
        1.0,
        _OUTLIER_LEVEL
        + max(_probability(changed, most_lost, n, share, limit) for share in won_shares),
    )


def _score(lost: Array, won: Array, n: int, limit: float) -> Array:
    """How far outcomes are from the limit, in standard deviations of those that are at it."""
    linear = (2 * n - lost + won) * limit - lost - won
    constant = -won * limit * (1 - limit)
    root = np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0.0))
    share = np.clip((root - linear) / (4 * n), max(0.0, -limit), (1 - limit) / 2)  # of won samples
    variance = np.maximum(n * (2 * share + limit - limit**2), 1e-300)
    score: Array = (lost - won - n * limit) / np.sqrt(variance)
    return score


def _most_lost(changed: NDArray[np.intp], n: int, limit: float, observed: float) -> Array:
    """For each number of changed samples how many may be lost for a score that is no larger."""
    low, high = np.full(len(changed), -1.0), changed + 1.0
    while float((high - low).max()) > 1:
        middle = np.floor((low + high) / 2)
        smaller = _score(np.maximum(middle, 0.0), changed - middle, n, limit) <= observed
        inside = high - low > 1
        low, high = (
            np.where(inside & smaller, middle, low),
            np.where(inside & ~smaller, middle, high),
        )
    return low


def _probability(
    changed: NDArray[np.intp], most_lost: Array, n: int, won_share: float, limit: float
) -> float:
    """Probability of at most so many lost samples, whatever the number of changed ones is."""
    share = min(2 * won_share + limit, 1.0)
    if share <= 0:
        return float(most_lost[0] >= 0)
    width = 8 * math.sqrt(n * share * (1 - share)) + 40
    first, last = max(0, int(n * share - width)), min(n, int(n * share + width)) + 1
    counts, bounds = changed[first:last], most_lost[first:last]
    weights = np.exp(
        scipy.special.gammaln(n + 1)
        - scipy.special.gammaln(counts + 1)
        - scipy.special.gammaln(n - counts + 1)
        + scipy.special.xlogy(counts, share)
        + scipy.special.xlog1py(n - counts, -share)
    )
    inside = scipy.special.bdtr(np.maximum(bounds, 0.0), counts, (won_share + limit) / share)
    return float(np.sum(weights * np.where(bounds < 0, 0.0, inside)))


def _share_interval(count: int, n: int) -> tuple[float, float]:
    """Ends between which a share lies (Clopper & Pearson 1934), with very high confidence."""
    level = _OUTLIER_LEVEL / 2
    low = float(scipy.special.betaincinv(count, n - count + 1, level)) if count else 0.0
    high = float(scipy.special.betainccinv(count + 1, n - count, level)) if count < n else 1.0
    return low, high


def share_p_value(count: int, n: int, limit: float) -> float:
    """The p-value of the exact binomial test that a share is below the limit.

    Parameters
    ----------
    count, n : int
        Samples that changed, and all.
    limit : float

    Examples
    --------
    >>> round(share_p_value(0, 300, 0.01), 4)
    0.049
    """
    if limit <= 0:
        return 1.0
    return float(scipy.special.bdtr(float(count), n, limit)) if limit < 1 else 0.0


def mean_p_value(values: Array, limit: float, confidence: float) -> float:
    """The p-value of a betting test that a mean of values between 0 and 1 is below the limit.

    Each bet stakes what the samples before it suggest, and wins where the next one is below the
    limit. If the mean were the limit or more, no capital would be expected to grow (Waudby-Smith &
    Ramdas 2024, JRSS B 86:1, with stakes for a fixed number of samples).

    Parameters
    ----------
    values : ndarray of shape (n,)
        In random order.
    limit : float
    confidence : float
        What the stakes are laid out for.
    """
    if limit >= 1:
        return 0.0
    if limit <= 0:
        return 1.0
    n = len(values)
    counts = np.arange(1, n + 1)
    squares = np.cumsum((values - np.cumsum(values) / counts) ** 2)
    variance = np.concatenate([[_FIRST_VARIANCE], (_FIRST_VARIANCE + squares[:-1]) / counts[1:]])
    level = -math.log(1 - confidence)
    stakes = np.minimum(np.sqrt(2 * level / (n * variance)), _MOST_STAKE / (1 - limit))
    capital = np.cumsum(np.log1p(stakes * (limit - values)))
    return min(1.0, math.exp(-float(capital.max())))


def samples_needed(share: float, limit: float, confidence: float) -> int:
    """About how many samples show a limit if that share of them loses, and none gains.

    Examples
    --------
    >>> samples_needed(0.0, 0.01, 0.95), samples_needed(1 / 300, 0.01, 0.95)
    (299, 655)
    """
    if not 0 < limit < 1:
        return 1
    low = max(1, math.ceil(math.log(1 - confidence) / math.log1p(-limit)))
    if share <= 0:
        return low

    def shows(n: float) -> bool:
        # Exact (Clopper & Pearson 1934): a normal bound promises too much of rare losses.
        return bool(scipy.special.betaincinv(share * n + 1, n - share * n, confidence) <= limit)

    high = low
    while not shows(high) and high < _MOST_SAMPLES:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


def highest_confidence(kind: Kind, n: int, limit: float) -> float:
    """The highest confidence at which n samples can show a limit.

    It takes a model that loses no sample. Errors and differences are hardly ever nothing: of them
    it takes a model that loses half of the limit on every sample.
    """
    exact = kind in ("pairs", "shares")
    losses = Losses(kind, np.full(n, 0.0 if exact else min(limit, 1.0) / 2))
    return 1 - losses.bounded(limit, kind).p_value(limit)
