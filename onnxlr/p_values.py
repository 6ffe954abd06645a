"""One-sided tests of losses: how likely so small a loss is where the true one is the limit."""

import math
from functools import lru_cache

import numpy as np
import scipy.special
from numpy.typing import NDArray

Array = NDArray[np.float64]

_OUTLIER_LEVEL = 1e-6  # probability that the share of changed samples is outside its interval
_NUISANCE_STEPS = 48
MOST_STAKE = 0.99  # of all that a bet may stake, so that no single sample loses everything
_FIRST_VARIANCE = 1e-2  # of losses scaled to 0 … 1, before the first sample


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
    observed = float(_score(np.array(float(lost)), np.array(float(won)), n, limit))
    low, high = _share_interval(lost + won, n)
    least = max(0.0, -limit)
    won_shares = np.linspace(
        max(least, (low - limit) / 2),
        max(least, min((1 - limit) / 2, (high - limit) / 2)),
        _NUISANCE_STEPS,
    )
    probabilities = _probabilities(n, limit, observed + 1e-9, won_shares)
    return min(1.0, _OUTLIER_LEVEL + float(probabilities.max()))


@lru_cache(maxsize=8)
def _log_binomials(n: int) -> Array:
    """Logarithms of the numbers of ways to choose 0 … n of n."""
    counts = np.arange(n + 1)
    ways: Array = (
        scipy.special.gammaln(n + 1)
        - scipy.special.gammaln(counts + 1)
        - scipy.special.gammaln(n - counts + 1)
    )
    return ways


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


def _probabilities(n: int, limit: float, observed: float, won_shares: Array) -> Array:
    """Probability of no larger a score than observed, for each share of won samples."""
    shares = np.clip(2 * won_shares + limit, 0.0, 1.0)[:, None]  # of changed samples
    reach = 8 * np.sqrt(n * shares * (1 - shares)) + 40  # beyond it nothing counts
    first = max(0, int((n * shares - reach).min()))
    last = min(n, int((n * shares + reach).max())) + 1
    counts = np.arange(first, last)
    bounds = _most_lost(counts, n, limit, observed)
    weights = np.exp(
        _log_binomials(n)[first:last]
        + scipy.special.xlogy(counts, shares)
        + scipy.special.xlog1py(n - counts, -shares)
    )
    lost_shares = np.clip((won_shares + limit)[:, None] / np.maximum(shares, 1e-300), 0.0, 1.0)
    inside = scipy.special.bdtr(np.maximum(bounds, 0.0), counts, lost_shares)
    return np.asarray((weights * np.where(bounds < 0, 0.0, inside)).sum(axis=1))


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


def compared_p_value(values: Array, limit: float) -> float:
    """The p-value of a normal test that a mean is below the limit: a half where it is the limit.

    It holds for many samples, and for few of which none is far from the others.

    Parameters
    ----------
    values : ndarray of shape (n,)
    limit : float

    Examples
    --------
    >>> compared_p_value(np.array([0.0, 0.4]), 0.2)
    0.5
    """
    gap = float(values.mean()) - limit
    error = float(values.std()) / math.sqrt(len(values))
    if error == 0:
        return 0.5 if gap == 0 else float(gap > 0)
    return float(scipy.special.ndtr(gap / error))


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
    stakes = np.minimum(np.sqrt(2 * level / (n * variance)), MOST_STAKE / (1 - limit))
    capital = np.cumsum(np.log1p(stakes * (limit - values)))
    return min(1.0, math.exp(-float(capital.max())))
