"""Rows of layers' inputs and outputs, sampled from the arrays of one run."""

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
        return sample_patches(layer, use, whole_batch(layer, x), count, rng)
    left = use.slot == 0  # the data stands on the right: its columns are the inputs
    if use.node.op_type == "Gemm" and int_attr(use.node, "transB" if left else "transA", 0):
        x = x.swapaxes(-1, -2)
    return _some_rows(layer, x, left, count, rng)


def sample_outputs(
    layer: Layer, use: Use, y: Values, count: int, rng: np.random.Generator
) -> Values:
    """At most so many rows of a user's outputs, as an array of shape (g, rows, m)."""
    if not layer.convolves:
        return _some_rows(layer, y, use.slot == 0, count, rng)
    y = whole_batch(layer, y)
    samples, channels = y.shape[:2]
    rows = y.reshape(samples, channels, -1).swapaxes(1, 2).reshape(1, -1, channels)
    rows = _chosen(rows, count, rng)
    return rows.reshape(rows.shape[1], layer.group, -1).swapaxes(0, 1)


def whole_batch(layer: Layer, x: Values) -> Values:
    """What a convolution is given or gives, with the iterations of a Loop among the samples."""
    return x.reshape(-1, *x.shape[1 - len(layer.shape) :])


def _some_rows(layer: Layer, x: Values, left: bool, count: int, rng: np.random.Generator) -> Values:
    """Some rows of the data beside a matrix, or columns where the matrix stands on the left.

    Beside a stack of matrices the data are a stack too, or the same for all of them.
    """
    if left and x.ndim > 1:
        x = x.swapaxes(-1, -2)
    stack = () if layer.kind == "projection" else layer.shape[:-2]
    if not stack:
        return _chosen(x.reshape(1, -1, x.shape[-1]), count, rng)
    lead = np.broadcast_shapes(x.shape[:-2], stack)
    x = np.broadcast_to(x, (*lead, *x.shape[-2:]))
    x = x.reshape(-1, math.prod(stack), *x.shape[-2:]).swapaxes(0, 1)
    return _chosen(x.reshape(len(x), -1, x.shape[-1]), count, rng)


def _chosen(rows: Values, count: int, rng: np.random.Generator) -> Values:
    """Some of the rows of each group, the same in all of them."""
    if rows.shape[1] <= count:
        return rows
    return rows[:, np.sort(rng.choice(rows.shape[1], count, replace=False))]


def doubled(rows: Values) -> Array:
    """Rows in double precision."""
    with np.errstate(invalid="ignore"):  # NaN of any kind stays NaN, and is left out
        return rows.astype(np.float64)


def is_finite(rows: NDArray[np.floating]) -> bool:
    """Whether all values are numbers whose squares can be summed."""
    largest = _LARGEST if rows.dtype == np.float64 else _LARGEST_SINGLE
    return bool((np.abs(rows) < largest).all())


def sample_patches(
    layer: Layer, use: Use, x: Values, rows: int, rng: np.random.Generator
) -> Values:
    """What a convolution's outputs are made from, at positions drawn without repetition.

    The positions are the same for all samples. An output of a ConvTranspose is made from the inputs
    that reach it, each by one position of the kernel; for the others there are zeros.

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
    places_of = _places_of_transposed
    if layer.kind == "conv":
        pads = _pads(use, x.shape[2:], reach, strides)
        x = np.pad(x, ((0, 0), (0, 0), *pads))
        places_of = _places_of_conv
    samples, channels = x.shape[:2]
    steps = list(zip(kernel, strides, dilations, strict=True))
    places, inside = places_of(use, x.shape[2:], reach, steps, max(1, -(-rows // samples)), rng)
    patches = x.reshape(samples, channels, -1)[:, :, places]  # (samples, channels, number, kh·kw)
    if inside is not None:
        patches = patches * inside.astype(patches.dtype)
    number = len(places)
    patches = patches.reshape(samples, group, channels // group, number, -1)
    return patches.transpose(1, 0, 3, 2, 4).reshape(group, samples * number, -1)


_Steps = Sequence[tuple[int, int, int]]  # of each axis the kernel's size, the stride, the dilation
_Places = tuple[NDArray[np.int64], NDArray[np.bool_] | None]


def _places_of_conv(
    use: Use,
    sizes: Sequence[int],
    reach: Sequence[int],
    steps: _Steps,
    rows: int,
    rng: np.random.Generator,
) -> _Places:
    """Where the elements of some patches are in a padded input, (number, kh · kw)."""
    del use
    counts = [(n - r) // s + 1 for n, r, (_, s, _) in zip(sizes, reach, steps, strict=True)]
    outputs = _drawn(counts, rows, rng)
    corners = outputs * np.array([stride for _, stride, _ in steps])[:, None]
    offsets = np.stack([o.ravel() for o in np.indices([k for k, _, _ in steps])])
    offsets = offsets * np.array([dilation for *_, dilation in steps])[:, None]
    places = np.ravel_multi_index(tuple(corners[:, :, None] + offsets[:, None, :]), tuple(sizes))
    return np.asarray(places, np.int64), None


def _places_of_transposed(
    use: Use,
    sizes: Sequence[int],
    reach: Sequence[int],
    steps: _Steps,
    rows: int,
    rng: np.random.Generator,
) -> _Places:
    """Which inputs reach some outputs by each position of the kernel, and where there is one."""
    strides = [stride for _, stride, _ in steps]
    heads, counts = _transposed_pads(use, sizes, reach, strides)
    outputs = _drawn(counts, rows, rng)
    offsets = np.stack([o.ravel() for o in np.indices([k for k, _, _ in steps])])
    offsets = offsets * np.array([dilation for *_, dilation in steps])[:, None]
    # An input i reaches the output o = stride · i + offset − head.
    away = outputs[:, :, None] + np.array(heads)[:, None, None] - offsets[:, None, :]
    each, stride = np.array(sizes)[:, None, None], np.array(strides)[:, None, None]
    inside = ((away % stride == 0) & (away >= 0) & (away < each * stride)).all(axis=0)
    inputs = np.where(inside, away // stride, 0)
    return np.asarray(np.ravel_multi_index(tuple(inputs), tuple(sizes)), np.int64), inside


def _drawn(counts: Sequence[int], rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of outputs, (axes, number), as many as there are or are wanted."""
    total = math.prod(counts)
    positions = np.sort(rng.choice(total, min(total, rows), replace=False))
    return np.stack(np.unravel_index(positions, counts)).astype(np.int64)


def _transposed_pads(
    use: Use, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What a ConvTranspose cuts off before each spatial axis, and the sizes of its output."""
    dims = len(sizes)
    mode, zeros = auto_pad(use.node), (0,) * dims
    extra = ints_attr(use.node, "output_padding", zeros)
    whole = [(n - 1) * s + r + e for n, s, r, e in zip(sizes, strides, reach, extra, strict=True)]
    wanted = ints_attr(use.node, "output_shape", ())[-dims:]
    if not wanted and mode in ("NOTSET", "VALID"):
        pads = ints_attr(use.node, "pads", (0,) * (2 * dims)) if mode == "NOTSET" else zeros * 2
        both = (a + b for a, b in zip(pads[:dims], pads[dims:], strict=True))
        return list(pads[:dims]), [w - cut for w, cut in zip(whole, both, strict=True)]
    wanted = wanted or tuple(n * s for n, s in zip(sizes, strides, strict=True))
    totals = [max(0, w - n) for w, n in zip(whole, wanted, strict=True)]
    # The odd one is cut off behind where padding is said to be larger there, else before.
    heads = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in totals]
    return heads, list(wanted)


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
