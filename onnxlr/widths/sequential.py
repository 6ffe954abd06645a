"""Readers of narrowed widths fitted in graph order, to what the narrowed model really gives them.

As with chains (``rewrite.sequential``): x̂ comes from the model as narrowed and fitted so far, and a
reader is fitted from x̂ to the output that the original had there.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import RunningMoments, is_wide
from onnxlr.decompose.interpolative import refitted
from onnxlr.layers.kernel import as_matrix
from onnxlr.prepare.originals import Originals, inputs_in_both
from onnxlr.prepare.prefix import Prefix
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Progress
from onnxlr.widths.find import Widths
from onnxlr.widths.narrow import Kept, Solved, narrowed
from onnxlr.widths.places import Mask, bias_place, column_mask, looked_at
from onnxlr.widths.strands import WeightCut

_RIDGE = 1e-2  # of an input's variance: what the data don't tell about M is left as it was
_ROWS = 2  # inputs for each of their elements, below which the samples would be learnt by heart


def readers_in_order(widths: Widths, kept: Kept) -> list[WeightCut]:
    """The readers of narrowed widths that can be fitted to their inputs, in graph order."""
    mask = widths.mask(kept)
    return [
        cut
        for cut in widths.weight_cuts("in")
        if looked_at(cut.layer) and not is_wide(cut.layer) and not mask[cut.channels].all()
    ]


def correct_readers(
    prepared: Prepared,
    widths: Widths,
    kept: Kept,
    plain: Mapping[str, Solved],
    samples: Samples,
    originals: Originals,
    seed: int,
    progress: Progress,
) -> dict[str, Solved]:
    """The readers of narrowed widths, each fitted behind those before it.

    Parameters
    ----------
    prepared : Prepared
    widths : Widths
        Of the prepared model.
    kept : mapping of str to tuple of int
    plain : mapping of str to Solved
        Each reader fitted by itself: what stays where its inputs can't be looked at.
    samples : Samples
    originals : Originals
        What readers are given in the original on such samples.
    seed : int
        Of the positions that are sampled.
    progress : Progress

    Raises
    ------
    ModelError
        If a model so far fails on the samples.
    """
    solved, so_far = dict(plain), Prefix(prepared.source, samples)
    cuts, mask = readers_in_order(widths, kept), widths.mask(kept)
    with progress.stage("correct readers in sequence", len(cuts)) as step:
        for cut in cuts:
            stays = mask[cut.channels]
            arguments = (prepared, kept, solved, cut, stays, samples, originals, so_far, seed)
            found = _refitted(*arguments)
            if found is not None:
                solved[cut.layer.name] = found
            step(cut.layer.name)
    return solved


@np.errstate(over="ignore", invalid="ignore")
def _refitted(
    prepared: Prepared,
    kept: Kept,
    solved: Mapping[str, Solved],
    cut: WeightCut,
    stays: Mask,
    samples: Samples,
    originals: Originals,
    so_far: Prefix,
    seed: int,
) -> Solved | None:
    """A reader fitted from its inputs in the narrowed model; None where too few belong together."""
    layer, axis = cut.layer, 1 if cut.layer.convolves else -1
    changed = narrowed(prepared.model, prepared.shapes, kept, solved)
    moments = RunningMoments(layer, samples.runs, seed, paired=True)
    for x_hat, x in inputs_in_both(layer, changed, so_far, originals, samples):
        for use in layer.uses:
            name = use.x.name or ""
            moments.add_pair(use, _widened(x_hat[name], stays, axis), x[name])
    weight = as_matrix(layer, layer.array())[0]
    if moments.shapes_differ or moments.rows < _ROWS * weight.shape[1]:
        return None
    inputs, (mean, cross) = moments.statistics(), moments.cross_moments()
    columns = column_mask(layer, stays)
    here, there = inputs.mean[0], mean[0]
    square, across = inputs.covariance[0], cross[0]
    free = all(bias_place(use) is not None for use in layer.uses)
    if not free:
        square, across = square + np.outer(here, here), across + np.outer(there, here)
    small = refitted(
        weight,
        across[:, columns],
        square[np.ix_(columns, columns)],
        solved[layer.name].weight,
        _RIDGE,
    )
    if not np.isfinite(small).all():
        return None
    return Solved(small, weight @ there - small @ here[columns] if free else None)


def _widened(x: NDArray[np.generic], stays: Mask, axis: int) -> NDArray[np.generic]:
    """Channels in their old places, with zeros where channels are gone."""
    shape = list(x.shape)
    shape[axis] = len(stays)
    whole = np.zeros(shape, dtype=x.dtype)
    moved = np.moveaxis(whole, axis, 0)
    moved[stays] = np.moveaxis(x, axis, 0)
    return whole
