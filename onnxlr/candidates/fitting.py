"""Factors fitted to a layer's inputs, for any method that has a form."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import Statistics
from onnxlr.decompose import Form, closed_form, has_closed_form, weighted_fit
from onnxlr.errors import ModelError
from onnxlr.layers.kernel import as_matrix
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.methods.choice import Choice, Factored
from onnxlr.prepare.prepared import Prepared
from onnxlr.types import Array, Rank


@dataclass(frozen=True)
class Effort:
    """How long alternating least squares goes on: sweeps, and steps for each factor."""

    sweeps: int
    steps: int


GLANCE = Effort(2, 3)  # tells an error to some per cent
THOROUGH = Effort(12, 3)  # of factors that are handed over
_WIDE = 1024  # elements of an input, beyond which a sweep takes a second: half as many there
_FLOOR = 1e-9  # of the mean variance: where there is none, no error would be too large


def fit_to_inputs(
    graph_pass: GraphPass,
    layer: Layer,
    rank: Rank,
    statistics: Statistics,
    effort: Effort,
    start: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """The factors that lose least of a layer's output; those of its weight if there is no form.

    Parameters
    ----------
    graph_pass : GraphPass
    layer : Layer
    rank : tuple of int
    statistics : Statistics
        Moments of the layer's inputs.
    effort : Effort
        How long to iterate where there is no closed form.
    start : tuple of ndarray, optional
        Factors of the weight to begin with, where they are computed already.
    """
    weight = as_matrix(layer, layer.array())
    covariance, metric = statistics.covariance, statistics.metric
    return fit_matrix(graph_pass, layer, rank, weight, covariance, metric, effort, start)


def fit_layer(
    prepared: Prepared, name: str, choice: Choice, statistics: Statistics | None
) -> Factored:
    """What stands in a layer's place: factors of its dtype, and the shift of its bias.

    Without statistics factors are those of the weight, and there is no shift.

    Raises
    ------
    ModelError
        If a factor is beyond what the dtype holds.
    """
    layer, graph_pass, rank = prepared.layer(name), choice.graph_pass, choice.rank
    fitted = (
        graph_pass.factorize(layer, rank)
        if statistics is None
        else fit_to_inputs(graph_pass, layer, rank, statistics, THOROUGH)
    )
    with np.errstate(over="ignore"):
        factors = tuple(f.astype(layer.dtype.numpy()) for f in fitted)
    if not all(np.isfinite(f).all() for f in factors):
        raise ModelError(
            f"the factors of {name!r} at rank {list(rank)} are beyond what {layer.dtype.name} holds"
        )
    shift = None
    if statistics is not None and not graph_pass.at_load:
        shift = bias_shift(rest_of(graph_pass, layer, rank, factors), statistics)
    return Factored(factors, shift)


def fit_matrix(
    graph_pass: GraphPass,
    layer: Layer,
    rank: Rank,
    weight: Array,
    covariance: Array,
    metric: Array | None,
    effort: Effort,
    start: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """Factors that approximate a matrix, as ``fit_to_inputs`` does a layer's weight.

    Parameters
    ----------
    weight : ndarray of shape (g, m, n)
        What the factors stand for, outputs × inputs.
    covariance : ndarray of shape (g, n, n)
        Of the inputs.
    metric : ndarray of shape (g, m, m), optional
        What errors of the outputs are multiplied by before they are squared.
    """
    form = graph_pass.form(layer)
    if form is None or not form.mixes:
        metric = None
    if metric is not None:
        weight = metric @ weight  # undone in the factor of the outputs, in the end
    covariance = np.stack([_floored(c) for c in covariance])
    if form is not None and has_closed_form(form):
        empty = _empty(graph_pass, layer, rank)
        groups = [
            closed_form(form, shapes, w, c)
            for shapes, w, c in zip(empty, weight, covariance, strict=True)
        ]
        return graph_pass.pack(layer, rank, _turned(form, groups, metric, back=True))
    factors = start if start is not None else graph_pass.factorize(layer, rank)
    if form is None:
        return factors
    if weight.shape[2] > _WIDE:
        effort = Effort(effort.sweeps // 2, effort.steps)
    starts = _turned(form, graph_pass.unpack(layer, rank, factors), metric)
    groups = [
        weighted_fit(form, group, w, c, effort.sweeps, effort.steps)[0]
        for group, w, c in zip(starts, weight, covariance, strict=True)
    ]
    return graph_pass.pack(layer, rank, _turned(form, groups, metric, back=True))


def _floored(covariance: Array) -> Array:
    """A covariance of few samples without the eigenvalues below zero that rounding leaves it.

    In directions that these inputs don't have the floor makes factors keep to the weight: other
    inputs may have them.
    """
    n = len(covariance)
    mean = float(np.trace(covariance)) / n
    return np.asarray(covariance + (_FLOOR * mean or 1.0) * np.eye(n))


def _turned(
    form: Form, groups: list[list[Array]], metric: Array | None, *, back: bool = False
) -> list[list[Array]]:
    """Factors of metric · W from those of W, or back: the factor with the outputs changes."""
    if metric is None:
        return groups
    letter = form.result[0]
    i = next(i for i, term in enumerate(form.terms) if letter in term)
    axis = form.terms[i].index(letter)
    turned = []
    for group, measure in zip(groups, metric, strict=True):
        flat = np.moveaxis(group[i], axis, 0)
        factor = (np.linalg.inv(measure) if back else measure) @ flat.reshape(len(flat), -1)
        factor = np.moveaxis(factor.reshape(flat.shape), 0, axis)
        turned.append([*group[:i], factor, *group[i + 1 :]])
    return turned


def closes(graph_pass: GraphPass, layer: Layer) -> bool:
    """Whether a method's best factors have a closed form."""
    form = graph_pass.form(layer)
    return form is not None and has_closed_form(form)


def closed_errors(graph_pass: GraphPass, layer: Layer, statistics: Statistics) -> Array | None:
    """Relative output error at every rank from 0 on; None if the method has no closed form."""
    if not closes(graph_pass, layer):
        return None
    weight = weighed(statistics, as_matrix(layer, layer.array()))
    values = np.linalg.eigvalsh(weight @ statistics.covariance @ weight.swapaxes(1, 2))
    energy = np.maximum(values[:, ::-1], 0.0).sum(axis=0)
    tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return np.sqrt(tail / tail[0]) if tail[0] > 0 else np.zeros_like(tail)


def _empty(graph_pass: GraphPass, layer: Layer, rank: Rank) -> list[list[Array]]:
    """Arrays in the shapes of the form's factors, for each group; their values don't count."""
    shapes = graph_pass.factor_shapes(layer, rank)
    return graph_pass.unpack(layer, rank, tuple(np.empty(shape) for shape in shapes))


def rest_of(
    graph_pass: GraphPass, layer: Layer, rank: Rank, factors: tuple[NDArray[np.generic], ...]
) -> Array:
    """W − W̃ as outputs × inputs, (g, m, n), where W̃ is what the stored factors multiply to."""
    doubles = tuple(f.astype(np.float64) for f in factors)
    return as_matrix(layer, layer.array()) - as_matrix(
        layer, graph_pass.compose(layer, rank, doubles)
    )


def weighed(statistics: Statistics, weight: Array) -> Array:
    """A weight (g, m, n), or a part of one, times the metric of its outputs, if there is one."""
    return weight if statistics.metric is None else statistics.metric @ weight


def output_error(layer: Layer, rest: Array, statistics: Statistics) -> float:
    """√( tr(R·C·Rᵀ) / tr(W·C·Wᵀ) ): the relative error of a layer's output for the rest R = W − W̃.

    It is exact for the inputs of the statistics, with a free bias. Outputs are weighed by the
    metric of the statistics, if there is one: by what the layers behind make of them.
    """
    both = (weighed(statistics, w) for w in (rest, as_matrix(layer, layer.array())))
    apart, whole = (float(np.sum((w @ statistics.covariance) * w)) for w in both)
    return math.sqrt(max(apart, 0.0) / whole) if whole > 0 else 0.0


def bias_shift(rest: Array, statistics: Statistics) -> Array:
    """(W − W̃)·μ for every output, of shape (g · m,): the bias has to make up for it."""
    return np.asarray(np.einsum("gmn,gn->gm", rest, statistics.mean).reshape(-1))
