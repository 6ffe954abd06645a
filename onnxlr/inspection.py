"""What is known about a model's layers before anything is changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxlr.decompose import evbmf
from onnxlr.graph_pass import choose_passes
from onnxlr.layers import Layer
from onnxlr.model import Source
from onnxlr.plan import Fit, fit_methods, name_filter
from onnxlr.prepare import prepare
from onnxlr.progress import Progress


@dataclass(frozen=True, eq=False)
class MethodFit:
    """A method that fits a layer.

    Attributes
    ----------
    method : str
    break_even : int
        The largest rank that saves parameters and MACs; 0 if none.
    evbmf : int
        EVBMF rank of its unfolding; the largest over the groups.
    energy : dict of float to int
        Smallest rank that keeps this share of the squared singular values.
    values : ndarray of shape (g, L)
        The spectrum.
    """

    method: str
    break_even: int
    evbmf: int
    energy: dict[float, int]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerInspection:
    """A layer, the methods that fit it, and the reasons of those that don't."""

    layer: Layer
    fits: tuple[MethodFit, ...]
    reasons: tuple[str, ...]


def inspect_source(
    source: Source,
    methods: Sequence[str],
    include: str | None,
    exclude: str | None,
    shapes: Sequence[str],
    batch: int,
    progress: Progress,
) -> tuple[LayerInspection, ...]:
    """Find every layer, and fit every method to it; nothing is run."""
    passes = choose_passes(tuple(methods))
    excluded = name_filter(include, exclude)
    prepared = prepare(source, feed=None, shapes=shapes, batch=batch)
    rows = []
    with progress.stage("decompose", len(prepared.layers)) as step:
        for layer in prepared.layers:
            if excluded(layer) is None:
                fits, reasons = fit_methods(layer, passes)
                found = tuple(_describe(layer, fit) for fit in fits)
                rows.append(LayerInspection(layer, found, reasons))
            step(layer.name)
    return tuple(rows)


def _describe(layer: Layer, fit: Fit) -> MethodFit:
    _, m, n = fit.graph_pass.unfolding_shapes(layer)[0]
    return MethodFit(
        fit.graph_pass.name,
        fit.limit,
        max(evbmf(row, m, n).rank for row in fit.values),
        {p: int(np.argmax(fit.errors <= np.sqrt(1 - p))) for p in (0.9, 0.99)},
        fit.values,
    )
