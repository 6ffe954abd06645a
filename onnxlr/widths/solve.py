"""What the readers of narrowed widths become: least squares to what they read before."""

from collections.abc import Mapping

import numpy as np

from onnxlr.calibrate.statistics import Statistics
from onnxlr.decompose.interpolative import refitted
from onnxlr.layers.kernel import as_matrix, kernel_of
from onnxlr.types import Array
from onnxlr.widths.find import Width, Widths
from onnxlr.widths.narrow import Kept, Solved
from onnxlr.widths.places import Mask, bias_place, column_mask, inputs_known
from onnxlr.widths.readings import Moments, Places, centred, readers_of
from onnxlr.widths.strands import WeightCut

_LEAST_RIDGE = 1e-9  # as a share of an input's second moment
_RIDGE = 0.02  # the same for as many rows as an input has elements; with more rows it is less

Means = Mapping[tuple[str, str], Moments]  # by the names of layer and width


def solve(
    widths: Widths,
    kept: Kept,
    statistics: Mapping[str, Statistics],
    moments: Means,
) -> dict[str, Solved]:
    """The weights of all that read narrowed widths, each fitted by itself.

    Parameters
    ----------
    widths : Widths
    kept : mapping of str to tuple of int
    statistics : mapping of str to Statistics
        Moments of the inputs of readers, by layer name.
    moments : mapping of (str, str) to Moments
        Of the channels that other readers see, by the names of layer and width: the channels that
        go become what the others make of them.
    """
    solved: dict[str, Solved] = {}
    mask = widths.mask(kept)
    for cut in widths.weight_cuts("in"):
        stays = mask[cut.channels]
        if stays.all():
            continue
        found = inputs_known(cut.layer, statistics.get(cut.layer.name))
        if found is not None:
            ridge = max(_LEAST_RIDGE, _RIDGE * len(found.mean[0]) / found.rows)
            solved[cut.layer.name] = _by_inputs(cut, stays, found, ridge)
        else:
            solved[cut.layer.name] = _by_channels(widths, cut, kept, moments)
    return solved


def _by_inputs(cut: WeightCut, stays: Mask, statistics: Statistics, ridge: float) -> Solved:
    """Least squares over all inputs of a reader, with a bias where there is a place for it."""
    layer = cut.layer
    weight = as_matrix(layer, layer.array())[0]
    columns = column_mask(layer, stays)
    mean, second = statistics.mean[0], statistics.covariance[0]
    free = all(bias_place(use) is not None for use in layer.uses)
    if not free:
        second = second + np.outer(mean, mean)
    small = refitted(
        weight, second[:, columns], second[np.ix_(columns, columns)], weight[:, columns], ridge
    )
    return Solved(small, weight @ mean - small @ mean[columns] if free else None)


def _by_channels(widths: Widths, cut: WeightCut, kept: Kept, moments: Means) -> Solved:
    """The channels that go become what the others of their width make of them, everywhere."""
    layer = cut.layer
    positions = kernel_of(layer).positions if layer.convolves else 1
    weight = as_matrix(layer, layer.array())[0]
    loaded = weight.reshape(len(weight), -1, positions).copy()
    shift = np.zeros(len(weight))
    for width in widths.usable:
        found = moments.get((layer.name, width.name))
        if width.name not in kept or layer.name not in width.readers or found is None:
            continue
        places = next(p for c, p in readers_of(widths, width) if c is cut)
        stay = np.array(kept[width.name])
        shift += _move(loaded, places, stay, width, found, about_mean=centred(cut))
    stays = widths.mask(kept)[cut.channels]
    return Solved(loaded[:, stays].reshape(len(weight), -1), shift if shift.any() else None)


def _move(
    loaded: Array,
    places: Places,
    kept: Places,
    width: Width,
    moments: Moments,
    *,
    about_mean: bool,
) -> Array:
    """Have the kept channels of a width do for all in a weight (m, inputs, positions), in place.

    Returns
    -------
    ndarray of shape (m,)
        What the bias makes up for.
    """
    second = moments.covariance if about_mean else moments.second
    identity = np.eye(width.size)
    t = refitted(
        identity, second[:, kept], second[np.ix_(kept, kept)], identity[:, kept], _LEAST_RIDGE
    )  # (C, k)
    rest = moments.mean - t @ moments.mean[kept] if about_mean else np.zeros(width.size)
    shift = np.zeros(len(loaded))
    for column in places.T:
        shift += np.einsum("mcp,c->m", loaded[:, column], rest)
        loaded[:, column[kept]] = np.einsum("mcp,ck->mkp", loaded[:, column], t)
    return shift
