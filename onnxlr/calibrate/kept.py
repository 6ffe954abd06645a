"""Statistics as the cache keeps them: of each covariance one triangle."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import Statistics, input_size, weight_only_reason
from onnxlr.layers.layer import Layer
from onnxlr.system.cache import Cache
from onnxlr.types import Array

# Those of few samples are made faster: a file is read at some hundred megabytes a second.
_BYTES_PER_SECOND = 20e6


def read_statistics(cache: Cache, key: str, layers: Sequence[Layer]) -> dict[str, Statistics]:
    """The statistics that the cache has of some layers."""
    arrays = cache.read_arrays("statistics", key)
    return {
        name: Statistics(
            arrays[f"mean {name}"],
            unpack_symmetric(arrays[f"covariance {name}"]),
            int(arrays[f"rows {name}"]),
        )
        for name in (layer.name for layer in layers if _are_statistics(arrays, layer))
    }


def write_statistics(
    cache: Cache, key: str, statistics: Mapping[str, Statistics], seconds: float
) -> None:
    """Keep the statistics of some layers, unless so few seconds made them that it doesn't pay."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, item in statistics.items():
        arrays[f"mean {name}"] = item.mean
        arrays[f"covariance {name}"] = pack_symmetric(item.covariance)
        arrays[f"rows {name}"] = np.array(item.rows)
    if sum(array.nbytes for array in arrays.values()) <= _BYTES_PER_SECOND * seconds:
        cache.write_arrays("statistics", key, arrays)


def pack_symmetric(matrices: Array) -> Array:
    """The lower triangles of matrices, row by row; whole ones where any isn't symmetric to the bit.

    Linear algebra makes XᵀX symmetric where it notices that both factors are one array.

    Parameters
    ----------
    matrices : ndarray of shape (g, n, n)

    Returns
    -------
    ndarray of shape (g, n · (n + 1) / 2), or the matrices

    Examples
    --------
    >>> pack_symmetric(np.array([[[1.0, 2.0], [2.0, 3.0]]]))
    array([[1., 2., 3.]])
    """
    bits = matrices.view(np.uint64)
    if not np.array_equal(bits, bits.swapaxes(1, 2)):
        return matrices
    rows = range(matrices.shape[1])
    return np.concatenate([matrices[:, i, : i + 1] for i in rows], axis=1)


def unpack_symmetric(packed: Array) -> Array:
    """What ``pack_symmetric`` was given.

    Examples
    --------
    >>> unpack_symmetric(np.array([[1.0, 2.0, 3.0]]))
    array([[[1., 2.],
            [2., 3.]]])
    """
    if packed.ndim == 3:
        return packed
    groups, elements = packed.shape
    n = math.isqrt(2 * elements)  # n ≤ √(n² + n) < n + 1
    matrices = np.empty((groups, n, n), packed.dtype)
    for i in range(n):
        row = packed[:, i * (i + 1) // 2 :][:, : i + 1]
        matrices[:, i, : i + 1] = matrices[:, : i + 1, i] = row
    return matrices


def _are_statistics(arrays: Mapping[str, NDArray[Any]], layer: Layer) -> bool:
    """Whether there are arrays for a layer, and they are what its ``Statistics`` are made of."""
    if weight_only_reason(layer) is not None:
        return False
    groups, n = layer.group, input_size(layer)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "mean": [(groups, n)],
        "covariance": [(groups, n * (n + 1) // 2), (groups, n, n)],
        "rows": [()],
    }
    for word, allowed in shapes.items():
        array = arrays.get(f"{word} {layer.name}")
        kind = "i" if word == "rows" else "f"
        if array is None or array.shape not in allowed or array.dtype.kind != kind:
            return False
        if not np.isfinite(array).all():
            return False
    return True
