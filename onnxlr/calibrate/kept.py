"""Statistics as the cache keeps them: of each covariance one triangle."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import (
    NO_COVARIANCE,
    Statistics,
    is_wide,
    weight_only_reason,
)
from onnxlr.calibrate.wide import gives_product
from onnxlr.layers.kernel import matrix_sides
from onnxlr.layers.layer import Layer
from onnxlr.system.cache import Cache
from onnxlr.types import Array

# Those of few samples are made faster: a file is read at some hundred megabytes a second.
_BYTES_PER_SECOND = 20e6
_OUTPUT = "output-"  # before the names of moments of outputs


def read_statistics(cache: Cache, key: str, layers: Sequence[Layer]) -> dict[str, Statistics]:
    """The statistics that the cache has of some layers."""
    arrays = cache.read_arrays("statistics", key)
    return {layer.name: _read(arrays, layer) for layer in layers if _are_statistics(arrays, layer)}


def write_statistics(
    cache: Cache, key: str, statistics: Mapping[str, Statistics], seconds: float
) -> None:
    """Keep the statistics of some layers, unless so few seconds made them that it doesn't pay."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, item in statistics.items():
        arrays |= _arrays_of(name, item)
        if item.outputs is not None:
            arrays |= _arrays_of(name, item.outputs, _OUTPUT)
    if sum(array.nbytes for array in arrays.values()) <= _BYTES_PER_SECOND * seconds:
        cache.write_arrays("statistics", key, arrays)


def _arrays_of(name: str, item: Statistics, kind: str = "") -> dict[str, NDArray[Any]]:
    """The arrays that statistics consist of, by what they are and the layer's name."""
    arrays: dict[str, NDArray[Any]] = {f"{kind}mean {name}": item.mean}
    if item.lookups is not None:
        arrays[f"lookups {name}"] = item.lookups
    elif item.sample is None:
        arrays[f"{kind}covariance {name}"] = pack_symmetric(item.covariance)
    else:
        arrays[f"{kind}sample {name}"] = item.sample
    return arrays | {f"{kind}rows {name}": np.array(item.rows)}


def _read(arrays: Mapping[str, NDArray[Any]], layer: Layer, kind: str = "") -> Statistics:
    """What ``_arrays_of`` made arrays of."""
    mean, rows = (arrays[f"{kind}{word} {layer.name}"] for word in ("mean", "rows"))
    if layer.kind == "gather":
        lookups = arrays[f"lookups {layer.name}"].astype(np.int64)
        return Statistics(mean, NO_COVARIANCE, int(rows), lookups=lookups)
    if kind or not is_wide(layer):
        covariance = unpack_symmetric(arrays[f"{kind}covariance {layer.name}"])
        return Statistics(mean, covariance, int(rows))
    sample = arrays[f"sample {layer.name}"]
    outputs = _read(arrays, layer, _OUTPUT) if gives_product(layer) else None
    return Statistics(mean, NO_COVARIANCE, int(rows), sample=sample, outputs=outputs)


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
    groups, m, n = matrix_sides(layer)
    if layer.kind == "gather":
        shapes: dict[str, tuple[int, ...]] = {"mean": (1, n), "lookups": (n,), "rows": ()}
        return all(_is_array(arrays, f"{w} {layer.name}", [shape]) for w, shape in shapes.items())
    if not is_wide(layer):
        return _are_moments(arrays, layer.name, groups, n)
    sample, rows = (arrays.get(f"{word} {layer.name}") for word in ("sample", "rows"))
    if sample is None or rows is None or rows.shape or rows.dtype.kind != "i":
        return False
    shapes = {"mean": (groups, n), "sample": (groups, int(rows), n)}
    if not all(
        _is_array(arrays, f"{word} {layer.name}", [shape]) for word, shape in shapes.items()
    ):
        return False
    if sample.dtype != np.float32:
        return False
    return not gives_product(layer) or _are_moments(arrays, layer.name, groups, m, _OUTPUT)


def _are_moments(
    arrays: Mapping[str, NDArray[Any]], name: str, groups: int, n: int, kind: str = ""
) -> bool:
    """Whether there are a mean and a covariance for so many elements."""
    shapes: dict[str, list[tuple[int, ...]]] = {
        "mean": [(groups, n)],
        "covariance": [(groups, n * (n + 1) // 2), (groups, n, n)],
        "rows": [()],
    }
    return all(
        _is_array(arrays, f"{kind}{word} {name}", allowed) for word, allowed in shapes.items()
    )


def _is_array(
    arrays: Mapping[str, NDArray[Any]], name: str, shapes: Sequence[tuple[int, ...]]
) -> bool:
    """Whether there is a finite array of this name and one of these shapes."""
    array = arrays.get(name)
    if array is None or array.shape not in shapes:
        return False
    word = name.split(" ")[0]
    kind = "i" if word.endswith("rows") or word == "lookups" else "f"
    return array.dtype.kind == kind and bool(np.isfinite(array).all())
