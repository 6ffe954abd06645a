"""Types that all stages share: arrays, shapes, ranks, and how a rank is read and written."""

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
