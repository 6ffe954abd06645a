"""What reads a width and what it reads there: moments of the channels, from samples or weights."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import Statistics
from onnxlr.decompose.interpolative import Reading
from onnxlr.layers.kernel import as_matrix, kernel_of
from onnxlr.layers.layer import Layer
from onnxlr.model.attributes import auto_pad, ints_attr
from onnxlr.model.constants import constant, values_of
from onnxlr.prepare.opening import session_of_values
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.system.session import ONE_CPU_THREAD
from onnxlr.types import Array
from onnxlr.widths.find import Width, Widths
from onnxlr.widths.places import bias_place
from onnxlr.widths.strands import ConstantCut, WeightCut

_ROWS = 64  # rows for each channel that are sampled for its moments
_MOST_ROWS = 65536
_SINGLE_NOISE = 1e-6  # of moments that were summed in single precision

Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (C,) and covariance (C, C) of the channels that a reader sees of a width.

    Their rounding is ``noise`` of each channel's variance.
    """

    mean: Array
    covariance: Array
    noise: float = 1e-12

    @property
    def second(self) -> Array:
        """Second moments about zero."""
        return np.asarray(self.covariance + np.outer(self.mean, self.mean))


def places_of(widths: Widths, cut: WeightCut, width: Width) -> Places:
    """Where a reader has the channels of a width, (C, r): each is there r times."""
    number = widths.rows.index(width)
    at = np.flatnonzero(widths.owners(cut.channels) == number)
    order = np.argsort(widths.places(cut.channels[at]), kind="stable")
    return np.asarray(at[order].reshape(width.size, -1))


def readers_of(widths: Widths, width: Width) -> Iterator[tuple[WeightCut, Places]]:
    """The weights that read a width, each with the places of its channels."""
    for cut in widths.weight_cuts("in"):
        if cut.layer.name in width.readers:
            yield cut, places_of(widths, cut, width)


def layer_moments(cut: WeightCut, places: Places, statistics: Statistics) -> Moments:
    """Moments of a width's channels by those of a reader's inputs: of all positions the mean."""
    positions = kernel_of(cut.layer).positions if cut.layer.convolves else 1
    mean, covariance = np.zeros(len(places)), np.zeros((len(places), len(places)))
    count = places.shape[1] * positions
    for r, p in itertools.product(range(places.shape[1]), range(positions)):
        columns = places[:, r] * positions + p
        mean += statistics.mean[0, columns] / count
        covariance += statistics.covariance[0][np.ix_(columns, columns)] / count
    return Moments(mean, covariance, _SINGLE_NOISE)


def sampled_moments(
    prepared: Prepared,
    widths: Widths,
    layers: Sequence[str],
    samples: Samples,
    seed: int,
) -> dict[tuple[str, str], Moments]:
    """Moments of the channels that some readers see, by the names of layer and width.

    Parameters
    ----------
    prepared : Prepared
    widths : Widths
        Of the prepared model.
    layers : sequence of str
        Readers whose inputs have no statistics.
    samples : Samples
    seed : int
        Of the positions that are sampled.
    """
    taps = [
        (width, cut, places)
        for width in widths.usable
        for cut, places in readers_of(widths, width)
        if cut.layer.name in layers and len({use.x for use in cut.layer.uses}) == 1
    ]
    if not taps:
        return {}
    names = {cut.use.x.name or "" for _, cut, _ in taps}
    session = session_of_values(prepared.model, names, ONE_CPU_THREAD, prepared.source)
    rng, runs = np.random.default_rng(seed), samples.runs
    sums = [(0, np.zeros(w.size), np.zeros((w.size, w.size))) for w, _, _ in taps]
    for feed, _, _ in samples.batches():
        values = dict(feed) | session.run(feed)
        for i, (width, cut, places) in enumerate(taps):
            share = max(8, min(_MOST_ROWS, _ROWS * width.size) // max(1, runs))
            axis = widths.strands[cut.use.x].axis
            rows = _rows(values[cut.use.x.name or ""], axis, places, share, rng)
            if np.isfinite(rows).all():
                count, first, second = sums[i]
                sums[i] = count + len(rows), first + rows.sum(axis=0), second + rows.T @ rows
    return {
        (cut.layer.name, width.name): Moments(
            first / count, second / count - np.outer(first, first) / count**2
        )
        for (width, cut, _), (count, first, second) in zip(taps, sums, strict=True)
        if count > 1
    }


def _rows(
    x: NDArray[np.generic], axis: int, places: Places, share: int, rng: np.random.Generator
) -> Array:
    """Some rows of channels of a value."""
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    if len(rows) * places.shape[1] > share:
        count = max(1, share // places.shape[1])
        rows = rows[np.sort(rng.choice(len(rows), min(count, len(rows)), replace=False))]
    picked = rows[:, places.T]  # (rows, r, C)
    return picked.reshape(-1, len(places)).astype(np.float64)


def reading(cut: WeightCut, places: Places, moments: Moments, metric: Array | None) -> Reading:
    """What a reader makes of a width's channels, by their moments.

    Where nothing stands beside a channel that could make up for its mean, the moments are about
    zero.
    """
    weight = as_matrix(cut.layer, cut.layer.array())[0]
    if metric is not None:
        weight = metric @ weight
    positions = kernel_of(cut.layer).positions if cut.layer.convolves else 1
    loaded = weight.reshape(len(weight), -1, positions)[:, places]  # (m, C, r, positions)
    stacked = loaded.transpose(2, 3, 0, 1).reshape(-1, len(places))
    free = centred(cut)
    return Reading(moments.covariance if free else moments.second, stacked, moments.noise)


def centred(cut: WeightCut) -> bool:
    """Whether a reader's bias makes up for a mean that it no longer sees, everywhere alike."""
    if any(bias_place(use) is None for use in cut.layer.uses):
        return False
    if not cut.layer.convolves:
        return True
    nodes = [use.node for use in cut.layer.uses]
    padded = any(any(ints_attr(n, "pads", ())) or auto_pad(n).startswith("SAME") for n in nodes)
    return cut.layer.kind == "conv" and not padded


def alike(widths: Widths, width: Width) -> Moments:
    """Moments as they would be if only those channels hung together that weights make equal.

    Channels are equal for certain where all that writes and carries them has the same numbers.
    """
    number = widths.rows.index(width)
    keys: list[list[bytes]] = [[] for _ in range(width.size)]
    for cut in widths.cuts:
        if isinstance(cut, WeightCut) and cut.side != "in":
            array = _outputs_first(cut)
        elif isinstance(cut, ConstantCut):
            tensor = constant(cut.node.inputs[cut.slot])
            assert tensor is not None
            array = np.moveaxis(values_of(tensor), cut.axis, 0)
        else:
            continue
        for at in np.flatnonzero(widths.owners(cut.channels) == number):
            place = int(widths.places(cut.channels[at : at + 1])[0])
            keys[place].append(np.ascontiguousarray(array[at]).tobytes())
    classes: Mapping[tuple[bytes, ...], int] = {
        key: i for i, key in enumerate(dict.fromkeys(map(tuple, keys)))
    }
    label = np.array([classes[tuple(key)] for key in keys])
    same = (label[:, None] == label).astype(np.float64)
    return Moments(np.zeros(width.size), same)


def _outputs_first(cut: WeightCut) -> NDArray[np.generic]:
    """A weight with an entry for each channel that it writes or passes on."""
    layer: Layer = cut.layer
    array = layer.array()
    if cut.side == "through":
        return array
    if layer.convolves:
        return np.asarray(kernel_of(layer).load(array)[0])
    return array if layer.uses[0].contracts_last else array.T
