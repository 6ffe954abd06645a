"""Empirical variational Bayes matrix factorization: the rank of a matrix under unknown noise.

Nakajima, Sugiyama, Babacan, Tomioka: Global analytic solution of fully-observed variational
Bayesian matrix factorization. JMLR 14 (2013). Nakajima, Tomioka, Sugiyama, Babacan: Perfect
dimensionality recovery by variational Bayesian PCA. NIPS 2012.
"""

from dataclasses import dataclass

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from onnxlr.types import Array

# Below this many ulps of the largest singular value a value is rounding, not noise. It keeps
# log σ² finite for matrices that are exactly rank-deficient.
_FLOOR = np.finfo(np.float64).eps
_WIDTH = 1e-9  # resolution in log σ²: far finer than the gap between two singular values
_CHUNK = 1 << 20  # elements of a (points × components) temporary


@dataclass(frozen=True)
class Evbmf:
    """The rank of a matrix by EVBMF, with the noise that it assumes.

    Attributes
    ----------
    rank : int
        Number of components above the noise; 0 for pure noise or a flat spectrum.
    sigma2 : float
        Estimated noise variance per entry, in the square of the matrix's units.
    free_energy : float
        The minimum of Ω(σ²) up to the constant −Σ log γ², for the matrix scaled to γ₁ = 1.
    shrunk : ndarray of shape (rank,)
        Posterior means of the singular values that stay.
    """

    rank: int
    sigma2: float
    free_energy: float
    shrunk: Array


def evbmf(singular_values: NDArray[np.floating], m: int, n: int) -> Evbmf:
    """Analytic EVBMF rank of an m × n matrix from all of its singular values.

    Scale-invariant (the values are divided by the largest first) and indifferent to
    transposition. The free energy Ω is not unimodal in σ²: it is minimised globally, by interval
    bisection on its derivative between the breakpoints where a component enters or leaves.

    Parameters
    ----------
    singular_values : ndarray of shape (min(m, n),)
        All singular values in descending order. Zeros are fine.
    m, n : int
        Shape of the matrix, in either order.

    Returns
    -------
    Evbmf
        The rank, the noise variance, the free energy, and the singular values less the noise.

    Raises
    ------
    ValueError
        If the number of singular values is not min(m, n).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> W = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 60)) + 0.1 * rng.normal(size=(40, 60))
    >>> evbmf(np.linalg.svd(W, compute_uv=False), 40, 60).rank
    3
    """
    L, M = min(m, n), max(m, n)
    s = np.asarray(singular_values, dtype=np.float64)
    if s.shape != (L,):
        raise ValueError(f"a {m}×{n} matrix has {L} singular values, got shape {s.shape}")
    scale = float(s[0]) if L else 0.0
    if scale == 0.0:
        return Evbmf(0, 0.0, 0.0, np.empty(0))
    gamma2 = (s / scale) ** 2
    energy = _FreeEnergy(gamma2, L, M)
    u, omega = energy.minimise()
    sigma2 = float(np.exp(u))
    rank = int(np.count_nonzero(gamma2 > M * sigma2 * energy.x_bar))
    g = s[:rank] / scale
    inner = 1 - (L + M) * sigma2 / g**2
    root = np.sqrt(np.maximum(inner**2 - 4 * L * M * sigma2**2 / g**4, 0.0))
    return Evbmf(rank, sigma2 * scale * scale, omega, scale * g / 2 * (inner + root))


def threshold_tau(alpha: float) -> float:
    """τ̲, the positive root of log(1+τ) + α·log(1+τ/α) − τ for α = L/M in (0, 1].

    Examples
    --------
    >>> round(threshold_tau(1.0), 4)
    2.5129
    """

    def f(tau: float) -> float:
        return float(np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau)

    return float(scipy.optimize.brentq(f, 0.5 * np.sqrt(alpha), 4.0, xtol=1e-300, rtol=1e-14))


def threshold_x(alpha: float) -> float:
    """x̲ = (1+τ̲)(1+α/τ̲) for α in (0, 1]: a component stays when its γ² exceeds M·σ²·x̲.

    Examples
    --------
    >>> round(threshold_x(1.0), 3)
    4.911
    """
    tau = threshold_tau(alpha)
    return (1 + tau) * (1 + alpha / tau)


class _FreeEnergy:
    """Ω as a function of u = log σ², less the constant −Σ log γ², with γ₁ = 1 and H = L.

    A component is active when x = γ²/(Mσ²) > x̲. With τ(x) from x = (1+τ)(1+α/τ),

        Ω(u)  = Σ (x + u) + Σ_active φ(τ),   φ = log(1+τ) + α·log(1+τ/α) − τ
        Ω'(u) = Σ_inactive (1 − x) − α·Σ_active (1 + 1/τ)

    where the first sum of Ω' rises with u and the second part falls. On an interval without
    breakpoints, ends therefore bound Ω' on the whole interval, which makes bisection rigorous.
    """

    def __init__(self, gamma2: Array, L: int, M: int) -> None:
        self.gamma2, self.L, self.M = gamma2, L, M
        self.alpha = L / M
        self.x_bar = threshold_x(self.alpha)
        self.tail = np.append(np.cumsum(gamma2[::-1])[::-1], 0.0)  # tail[k] = Σ_{h≥k} γ²
        h = min(int(np.ceil(L / (1 + self.alpha))) - 1, L)
        lower = max(gamma2[h] / (M * self.x_bar), self.tail[h] / (M * (L - h)))
        upper = self.tail[0] / (L * M)
        floor = _FLOOR**2 / M
        self.lo = float(np.log(max(lower, floor)))
        self.hi = max(float(np.log(max(upper, floor))), self.lo)

    def minimise(self) -> tuple[float, float]:
        """The global minimiser u on [lo, hi], and Ω there."""
        with np.errstate(divide="ignore"):
            breaks = np.log(self.gamma2 / (self.M * self.x_bar))
        inside = breaks[(breaks > self.lo) & (breaks < self.hi)]
        edges = np.unique(np.concatenate([[self.lo, self.hi], inside]))
        points = [edges]
        a, b = edges[:-1], edges[1:]
        # Active on (a, b): every component whose breakpoint is at b or beyond.
        k = np.searchsorted(-breaks, -b, side="right")
        while a.size:
            rise_a, fall_a = self._slopes(a, k)
            rise_b, fall_b = self._slopes(b, k)
            open_ = (rise_a + fall_b < 0) & (rise_b + fall_a > 0)
            a, b, k = a[open_], b[open_], k[open_]
            middle = (a + b) / 2
            points.append(middle)
            wide = b - a > _WIDTH
            a, b, k, middle = a[wide], b[wide], k[wide], middle[wide]
            a, b, k = np.append(a, middle), np.append(middle, b), np.append(k, k)
        u = np.concatenate(points)
        values = self(u)
        best = int(np.argmin(values))
        return float(u[best]), float(values[best])

    def __call__(self, u: Array) -> Array:
        """Ω at every point."""
        omega = np.empty_like(u)
        most = max(1, _CHUNK // self.L)
        for i in range(0, u.size, most):
            part = u[i : i + most, None]
            x = self.gamma2 / (self.M * np.exp(part))
            tau = self._tau(np.maximum(x, self.x_bar))
            phi = np.log1p(tau) + self.alpha * np.log1p(tau / self.alpha) - tau
            omega[i : i + most] = np.sum(x + part + np.where(x > self.x_bar, phi, 0.0), axis=1)
        return omega

    def _slopes(self, u: Array, k: NDArray[np.intp]) -> tuple[Array, Array]:
        """The rising and the falling part of Ω' at every u, with its first k components active."""
        noise = self.M * np.exp(u)
        rise = (self.L - k) - self.tail[k] / noise
        fall = np.zeros_like(u)
        order = int(k.max(initial=0))
        most = max(1, _CHUNK // max(order, 1))
        for i in range(0, u.size, most):
            part = slice(i, i + most)
            x = np.maximum(self.gamma2[:order] / noise[part, None], self.x_bar)
            active = np.arange(order) < k[part, None]
            fall[part] = -self.alpha * np.sum(np.where(active, 1 + 1 / self._tau(x), 0.0), axis=1)
        return rise, fall

    def _tau(self, x: Array) -> Array:
        """The larger τ of x = (1+τ)(1+α/τ)."""
        c = x - (1 + self.alpha)
        return (c + np.sqrt(np.maximum(c**2 - 4 * self.alpha, 0.0))) / 2
