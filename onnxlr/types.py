"""Types that all stages share: arrays, shapes, ranks, and how ranks and times are written."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rank = tuple[int, ...]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # static shapes by the names of values


def rank_text(rank: Rank) -> str:
    """A rank as users read and write it: a number, or several with commas."""
    return ",".join(map(str, rank))


def ms_text(ms: float) -> str:
    """Milliseconds as users read them: with so many digits that ratios can be checked.

    Examples
    --------
    >>> ms_text(0.0091234), ms_text(1.25), ms_text(1234.5)
    ('0.009123', '1.250', '1234.5')
    """
    digits = 3 - math.floor(math.log10(ms)) if ms > 0 and math.isfinite(ms) else 3
    return f"{ms:.{max(digits, 1)}f}"
