"""A model's layers, and what methods could make of them, before anything is changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxlr.candidates.fits import Fit, fit_all
from onnxlr.candidates.spectra import decompose
from onnxlr.decompose import RankRule
from onnxlr.layers.layer import Layer
from onnxlr.layers.select import name_filter
from onnxlr.methods.channels import names_channels
from onnxlr.methods.registry import choose_passes
from onnxlr.model.load import Source
from onnxlr.prepare.prepared import prepare
from onnxlr.progress import Progress
from onnxlr.system.cache import open_cache
from onnxlr.system.pool import Pool
from onnxlr.types import Rank
from onnxlr.widths.find import Width
from onnxlr.widths.narrowing import widths_of


@dataclass(frozen=True, eq=False)
class MethodFit:
    """A method that fits a layer.

    A rank has one component for most methods, two for ``tucker2``.

    Attributes
    ----------
    method : str
    full_rank : tuple of int
        The rank at which it is exact.
    break_even : tuple of int
        The largest rank, in proportion to the full one, that saves parameters and MACs; zeros if
        none.
    evbmf : tuple of int
        EVBMF rank of each unfolding; the largest over the groups.
    energy : dict of float to tuple of int
        Smallest rank that keeps this share of the squared singular values.
    values : tuple of ndarray of shape (g, L)
        The spectrum of each unfolding.
    """

    method: str
    full_rank: Rank
    break_even: Rank
    evbmf: Rank
    energy: dict[float, Rank]
    values: tuple[NDArray[np.float64], ...]


@dataclass(frozen=True, eq=False)
class LayerInspection:
    """A layer, the methods that fit it, and the reasons of those that don't."""

    layer: Layer
    fits: tuple[MethodFit, ...]
    reasons: tuple[str, ...]


class Inspection(tuple[LayerInspection, ...]):
    """A row for every layer, and the widths between them.

    Attributes
    ----------
    widths : tuple of Width
        Those that may be narrowed, and those that have to stay with their reason; none where
        methods were named and ``interpolative`` isn't among them.
    """

    widths: tuple[Width, ...] = ()


def inspect_source(
    source: Source,
    methods: Sequence[str],
    include: str | None,
    exclude: str | None,
    shapes: Sequence[str],
    batch: int,
    progress: Progress,
) -> Inspection:
    """Find every layer, and fit every method to it; nothing is run."""
    passes = choose_passes(tuple(methods))
    excluded = name_filter(include, exclude)
    prepared = prepare(source, feed=None, shapes=shapes, batch=batch)
    layers = [layer for layer in prepared.layers if excluded(layer) is None]
    fits = fit_all(layers, passes, lambda _: None)
    if passes:
        with progress.stage("decompose", len(layers)) as step:
            fits = decompose(prepared, fits, Pool(None), open_cache(), step)
    rows = Inspection(
        LayerInspection(
            layer,
            tuple(_describe(fit) for fit in fits.by_layer[layer.name]),
            fits.refusals[layer.name],
        )
        for layer in layers
    )
    if not methods or "auto" in methods or names_channels(methods):
        left_out = {x.name: why for x in prepared.layers if (why := excluded(x)) is not None}
        rows.widths = widths_of(prepared).without(left_out).rows
    return rows


def _describe(fit: Fit) -> MethodFit:
    rule = RankRule("evbmf")
    return MethodFit(
        fit.graph_pass.name,
        fit.full,
        fit.limit,
        tuple(rule.select(s.values, s.m, s.n, 0.0) for s in fit.spectra),
        {
            p: tuple(int(np.argmax(s.errors <= np.sqrt(1 - p))) for s in fit.spectra)
            for p in (0.9, 0.99)
        },
        tuple(s.values for s in fit.spectra),
    )
