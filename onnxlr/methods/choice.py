"""What replaces a layer: a method at a rank, and the factors that it stores."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxlr.methods.base import GraphPass
from onnxlr.model.graph import ArrayFile
from onnxlr.types import Rank

Factors = tuple[NDArray[np.generic], ...]


@dataclass(frozen=True, eq=False)
class Factored:
    """What stands in a weight's place.

    Attributes
    ----------
    stored : tuple of ndarray or ArrayFile
        The factors as they are stored, in memory or in files.
    shift : ndarray of shape (outputs,) or None
        The difference in the mean of the layer's output, which its bias makes up for.
    """

    stored: tuple[NDArray[np.generic] | ArrayFile, ...]
    shift: NDArray[np.float64] | None = None

    @property
    def factors(self) -> Factors:
        """The factors; read anew each time where they lie in files."""
        return tuple(f.array() if isinstance(f, ArrayFile) else f for f in self.stored)

    def filed(self, stem: Path) -> "Factored":
        """These factors moved to files of this name and a number.

        Raises
        ------
        OSError
            If they can't be written.
        """
        files = []
        for i, factor in enumerate(self.factors):
            path = stem.with_name(f"{stem.name}-{i}")
            np.ascontiguousarray(factor).view(np.uint8).tofile(path)
            files.append(ArrayFile(path, factor.dtype, factor.shape))
        return Factored(tuple(files), self.shift)


@dataclass(frozen=True)
class Choice:
    """What replaces a layer: the pass and its rank."""

    graph_pass: GraphPass
    rank: Rank


def plan_digest(
    model: str,
    chosen: Mapping[str, tuple[str, Rank | None]],
    calibration: str = "",
    kept: Mapping[str, tuple[int, ...]] | None = None,
) -> str:
    """SHA-256 of what makes a model: its digest, the choices, the samples', and channels kept."""
    content = [model, sorted((n, m, r) for n, (m, r) in chosen.items()), calibration]
    if kept:
        content.append(sorted(kept.items()))
    text = json.dumps(content)
    return hashlib.sha256(text.encode()).hexdigest()
