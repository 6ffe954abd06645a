"""What samples show of a loss: one-sided tests at a confidence, bounds, and how many it takes.

The true loss of a model is the mean of what it loses on a sample, over all that there could be.
Some samples show at a confidence that it is within a limit, if a model whose true loss is the limit
would come off so well with no more than the remaining probability.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import NDArray

from onnxlr.p_values import (
    MOST_STAKE,
    compared_p_value,
    mean_p_value,
    pairs_p_value,
    share_p_value,
)

Kind = Literal["pairs", "shares", "errors", "differences"]
GRADED = ("errors", "differences")  # kinds of which a sample may lose a part; the others count
Array = NDArray[np.float64]

USUAL_CONFIDENCE = 0.95
# Confidence up to which the mean of errors or differences is compared with the limit as it is: with
# a test that is valid for every distribution, few samples show nothing even there.
COMPARING = 0.55
LEAST_CONFIDENCE = 0.5  # which every mean within the limit has
# Nothing can be shown of errors and differences without a bound on what one sample may lose. It is
# thought to be so many times the most that any was seen to lose, or so many limits if that is more:
# errors of samples are alike, and of differences most are zero and few are large.
WORST = 2.0
WORST_ERROR, WORST_DIFFERENCE = 10.0, 25.0
USUAL_DIFFERENCE = 3.0  # limits by which samples usually differ, from one to the next
_STAKES = 64  # among which the best constant one is looked for
_MOST_SAMPLES = 1 << 30  # that are thought of
_PRECISION = 1e-4  # of a bound, relative to it, or to a hundredth
_TINY = 1e-30  # a bound on errors where all of them are zero
_MOST_EXACT = 10_000  # samples, beyond which a normal approximation is close
_MORE = 1.03  # from one number of samples that is thought of to the next
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
        The largest value that was seen of other samples, or of a difference of other models.
    reach : float
        The largest value that is thought possible; no value is larger. For differences at most 1.
    most : float
        The largest error that is possible, which no value exceeds: infinity where there is none.

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
    most: float = math.inf

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        """The loss on these samples."""
        return self.scale * float(self.values.mean() ** (1 / self.power))

    @property
    def noise(self) -> float:
        """About the standard error of the loss."""
        step = self.scale * float(self.values.std()) / math.sqrt(max(1, len(self)))
        root = self.mean / self.scale
        slope = root ** (1 - self.power) / self.power if root > 0 else 1.0  # of the root of a mean
        return step if self.power == 1 else step * slope

    @property
    def largest(self) -> float:
        """The largest difference of a sample."""
        return float(np.abs(self.values).max(initial=0.0))

    def beside(self, other: "Losses") -> "Losses":
        """The same, where the same model was seen to lose this on other samples."""
        return replace(self, seen=max(self.seen, other.largest))

    def bounded(self, limit: float, kind: Kind | None) -> "Losses":
        """The same, as it is tested against a limit.

        Of a metric that gives more than 0 and 1, a sample may lose 1 at most, and with that bound
        few samples show nothing: one in a hundred might lose all, and none of them be among fifty.
        So no sample is thought to lose more than some limits, or than twice what any was seen to.

        Parameters
        ----------
        limit : float
            Infinity where there is none: then the mean is what stands for it.
        kind : str or None
            What a sample loses by the metric. A model that loses none doesn't tell by itself.
        """
        largest = WORST * max(self.seen, self.largest)
        if not len(self):
            return self
        if "differences" in (self.kind, kind):
            limits = WORST_DIFFERENCE * limit / self.scale
            return replace(self, kind="differences", reach=min(1.0, max(limits, largest)))
        if self.kind != "errors":
            return self
        usual = (limit / self.scale) ** self.power
        usual = usual if math.isfinite(usual) else float(self.values.mean())
        return replace(self, reach=min(self.most, max(WORST_ERROR * usual, largest, _TINY)))

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
        return _p_value(*self._unit(limit), confidence)

    def shows(self, limit: float, confidence: float) -> bool:
        """Whether the samples show, at this confidence, that the true loss is below the limit."""
        return self.p_value(limit, confidence) <= _level(confidence)

    def at_most(self, confidence: float) -> float:
        """The least limit that the samples show; infinity if they show none."""
        return self.scale * _boundary(
            lambda limit: _excess(self.p_value(self.scale * limit, confidence), confidence),
            self.mean / self.scale,
            self.most if self.kind == "errors" else 1.0,
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

        def shortfall(limit: float) -> float:
            values, share = self._unit(limit)
            return -_excess(_p_value(1 - values, 1 - share, confidence), confidence)

        return _boundary(shortfall, 0.0, self.mean) if self.mean > 0 else 0.0

    def needed(self, limit: float, confidence: float) -> int | None:
        """About how many such samples would show the limit; None if no number would."""
        gap = (limit - self.mean) / self.scale
        if gap <= 0:
            return None
        if self.kind not in GRADED:
            least = samples_needed(self.mean / self.scale, limit / self.scale, confidence)
            least = max(_normal_needed(self.values, gap, confidence), least)
            if not self.shows(limit, confidence):
                least = max(least, len(self) + 1)
            while least < _MOST_EXACT and not self.would_show(least, limit, confidence):
                least = math.ceil(_MORE * least)
            return least
        values, share = self._unit(limit / self.scale)
        if confidence <= COMPARING:
            return _normal_needed(values, share - float(values.mean()), confidence)
        stakes = np.linspace(0, MOST_STAKE / (1 - share), _STAKES)[1:]
        growth = float(np.log1p(np.outer(stakes, share - values)).mean(axis=1).max())
        return math.ceil(-math.log(1 - confidence) / growth) if growth > 0 else None

    def would_show(self, count: int, limit: float, confidence: float) -> bool:
        """Whether so many samples would show the limit, if they lost what these did."""
        if self.kind in GRADED:
            needed = self.needed(limit, confidence)
            return needed is not None and needed <= count
        share = count / len(self)
        lost, won = (share * int(np.count_nonzero(self.values == sign)) for sign in (1, -1))
        limit /= self.scale
        if self.kind == "shares":
            p_value = share_p_value(math.ceil(share * float(self.values.sum())), count, limit)
        else:
            p_value = pairs_p_value(math.ceil(lost), math.floor(won), count, limit)
        return p_value <= _level(confidence)

    def _unit(self, limit: float) -> tuple[Array, float]:
        """The values on a scale from 0 to 1, and the limit on it."""
        if self.kind == "differences":
            share = (limit / self.reach + 1) / 2
            return (self.values / self.reach + 1) / 2, min(max(share, 0.0), 1.0)
        if limit <= 0:
            return np.ones(len(self)), 0.0
        return np.minimum(self.values / self.reach, 1.0), limit**self.power / self.reach


def _p_value(values: Array, limit: float, confidence: float) -> float:
    """The p-value that counts of a mean of values between 0 and 1."""
    if confidence <= COMPARING:
        return compared_p_value(values, limit)
    return mean_p_value(values, limit, confidence)


def _normal_needed(values: Array, gap: float, confidence: float) -> int:
    """How many samples show that a mean is no more than so far above what it is on these."""
    deviations = max(0.0, float(scipy.special.ndtri(confidence)))
    return max(1, math.ceil(deviations**2 * float(values.var()) / gap**2))


def _level(confidence: float) -> float:
    """The largest p-value that shows something."""
    return (1 - confidence) * (1 + 1e-9)


def _excess(p_value: float, confidence: float) -> float:
    """How far a p-value is above the largest that shows something, in standard deviations."""
    probabilities = np.clip([p_value, _level(confidence)], 1e-15, 1 - 1e-15)
    above, level = scipy.special.ndtri(probabilities)
    return float(above - level)


def _boundary(
    excess: Callable[[float], float], low: float, high: float, step: float = math.inf
) -> float:
    """The least value from which on a falling function is below 0; the upper end if it never is.

    With a step it is looked for in ever larger steps from the lower end on.
    """
    while low + step < min(high, _FARTHEST):
        if excess(low + step) <= 0:
            high = low + step
            break
        low, step = low + step, 2 * step
    if math.isinf(high) or excess(high) > 0:
        return high
    if excess(low) <= 0:
        return low
    share, least = _PRECISION / 2, _PRECISION * 0.01 / 2
    root = float(scipy.optimize.brentq(excess, low, high, xtol=least, rtol=share))
    return min(high, root + least + share * abs(root))


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
    it takes a model that loses half of the limit, of errors on every sample. Differences go both
    ways, by some limits: without that no real model would be shown to hold it. However few they
    are, their mean can be compared.
    """
    exact = kind not in GRADED
    values = np.full(n, 0.0 if exact else min(limit, 1.0) / 2)
    if kind == "differences":
        values += USUAL_DIFFERENCE * limit * (-1.0) ** np.arange(n)
    losses = Losses(kind, np.clip(values, -1.0, 1.0))
    highest = 1 - losses.bounded(limit, kind).p_value(limit)
    return highest if exact else max(highest, LEAST_CONFIDENCE)
