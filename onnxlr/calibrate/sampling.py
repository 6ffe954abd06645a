"""Rows of what layers are given and give, sampled from the arrays of one run."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxlr.layers.layer import Layer, Use
from onnxlr.model.attributes import auto_pad, int_attr, ints_attr
from onnxlr.types import Array

Values = NDArray[np.generic]

# Values of an input up to which its row counts, in double and in single precision.
_LARGEST, _LARGEST_SINGLE = 1e100, 1e15


def sample_rows(layer: Layer, use: Use, x: Values, count: int, rng: np.random.Generator) -> Values:
    """About so many rows of a user's inputs, as an array of shape (g, rows, n)."""
    if layer.convolves:
        return sample_patches(layer, use, x, count, rng)
    left = use.slot == 0  # the data stands on the right: its columns are the inputs
    if use.node.op_type == "Gemm" and int_attr(use.node, "transB" if left else "transA", 0):
        x = x.swapaxes(-1, -2)
    return _some_rows(x, left, count, rng)[None]


def sample_outputs(
    layer: Layer, use: Use, y: Values, count: int, rng: np.random.Generator
) -> Values:
    """At most so many rows of a user's outputs, as an array of shape (g, rows, m)."""
    if not layer.convolves:
        return _some_rows(y, use.slot == 0, count, rng)[None]
    samples, channels = y.shape[:2]
    rows = y.reshape(samples, channels, -1).swapaxes(1, 2).reshape(-1, channels)
    rows = _chosen(rows, count, rng)
    return rows.reshape(len(rows), layer.group, -1).swapaxes(0, 1)


def _some_rows(x: Values, left: bool, count: int, rng: np.random.Generator) -> Values:
    """Some rows of the data beside a matrix, or columns where the matrix stands on the left."""
    if left and x.ndim > 1:
        x = x.swapaxes(-1, -2)
    return _chosen(x.reshape(-1, x.shape[-1]), count, rng)


def _chosen(rows: Values, count: int, rng: np.random.Generator) -> Values:
    if len(rows) <= count:
        return rows
    return rows[np.sort(rng.choice(len(rows), count, replace=False))]


def doubled(rows: Values) -> Array:
    """Rows in double precision."""
    with np.errstate(invalid="ignore"):  # NaN of any kind stays NaN, and is left out
        return rows.astype(np.float64)


def is_finite(rows: NDArray[np.floating]) -> bool:
    """Whether all values are numbers whose squares can be summed."""
    largest = _LARGEST if rows.dtype == np.float64 else _LARGEST_SINGLE
    return bool((np.abs(rows) < largest).all())


def sample_patches(
    layer: Layer, use: Use, x: NDArray[np.generic], rows: int, rng: np.random.Generator
) -> NDArray[np.generic]:
    """Patches of a Conv's input, at positions drawn without repetition, the same for all samples.

    Returns
    -------
    ndarray of shape (g, patches, S/g · kh · kw)
        About ``rows`` patches, at least one of each sample.
    """
    group, kernel = layer.group, layer.shape[2:]
    dims = len(kernel)
    strides = ints_attr(use.node, "strides", (1,) * dims)
    dilations = ints_attr(use.node, "dilations", (1,) * dims)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(use, x.shape[2:], reach, strides)
    x = np.pad(x, ((0, 0), (0, 0), *pads))
    sizes = x.shape[2:]
    counts = [(n - r) // s + 1 for n, r, s in zip(sizes, reach, strides, strict=True)]
    samples, channels = x.shape[:2]
    total = math.prod(counts)
    number = min(total, max(1, -(-rows // samples)))
    positions = np.sort(rng.choice(total, number, replace=False))
    corners = np.stack(np.unravel_index(positions, counts)) * np.array(strides)[:, None]
    offsets = np.stack([o.ravel() for o in np.indices(kernel)]) * np.array(dilations)[:, None]
    places = np.ravel_multi_index(tuple(corners[:, :, None] + offsets[:, None, :]), sizes)
    patches = x.reshape(samples, channels, -1)[:, :, places]  # (samples, channels, number, kh·kw)
    patches = patches.reshape(samples, group, channels // group, number, -1)
    return patches.transpose(1, 0, 3, 2, 4).reshape(group, samples * number, -1)


def _pads(
    use: Use, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis, with auto_pad as the runtime reads it."""
    dims = len(sizes)
    mode = auto_pad(use.node)
    if mode == "NOTSET":
        pads = ints_attr(use.node, "pads", (0,) * (2 * dims))
        return [(pads[i], pads[dims + i]) for i in range(dims)]
    if mode == "VALID":
        return [(0, 0)] * dims
    both = []
    for size, r, s in zip(sizes, reach, strides, strict=True):
        whole = max(0, (-(-size // s) - 1) * s + r - size)
        small, large = whole // 2, whole - whole // 2
        both.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return both
