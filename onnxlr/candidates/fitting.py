"""Factors fitted to a layer's inputs, for any method that has a form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.shared import fit_shared, refit_shared, shared_energies
from onnxlr.decompose import (
    Covariance,
    Form,
    Moments,
    SampledMoments,
    closed_form,
    has_closed_form,
    leading_eigenvectors,
    leading_outputs,
    output_energies,
    shrunk_moments,
    weighted_fit,
)
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
_MANY = 1 << 23  # elements of sampled rows, beyond which a sweep takes seconds: a quarter as many
_GLANCED = 1 << 24  # elements of sampled rows that tell an error
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
    if graph_pass.shares:
        return fit_shared(graph_pass, layer, rank, input_moments(statistics)[0])
    weight = as_matrix(layer, layer.array())
    most = _GLANCED if effort == GLANCE else None
    return fit_matrix(
        *(graph_pass, layer, rank, weight, input_moments(statistics, most), statistics.metric),
        *(effort, start),
        outputs=output_covariance(statistics, weight),
    )


def input_moments(statistics: Statistics, most: int | None = None) -> list[Moments]:
    """Second moments of a layer's inputs, group by group, that factors are fitted to.

    Of sampled rows as many are taken as have so many elements, at most.
    """
    if statistics.lookups is not None:
        nothing = np.empty((0, len(statistics.lookups)), np.float32)
        return [SampledMoments(nothing, 0.0, lookup_shares(statistics.lookups))]
    if statistics.sample is None:
        return [Covariance(floored(c)) for c in statistics.covariance]
    rows = _fitted_rows(statistics.sample)
    if most is not None:
        rows = max(1, min(rows, most // statistics.sample.shape[2]))
    fitted = statistics.sample[:, :rows]
    return [shrunk_moments(rows) for rows in fitted]


def lookup_shares(counts: NDArray[np.int64]) -> Array:
    """How likely a lookup meets each entry of a table.

    Entries that weren't seen have together what those have that were seen once (Good 1953), and all
    are given as much of it.
    """
    total, entries = int(counts.sum()), len(counts)
    unseen = max(1, int(np.count_nonzero(counts == 1))) / max(1, total)
    share = min(unseen, 1.0)
    return (1 - share) * counts / max(1, total) + share / entries


def _fitted_rows(sample: NDArray[np.float32]) -> int:
    """How many of the sampled rows factors are fitted to: the others tell errors.

    Where there are fewer rows than elements, factors could learn them by heart.
    """
    return max(1, int(sample.shape[1]) * 3 // 4)


def output_covariance(statistics: Statistics, weight: Array) -> Array | None:
    """W·C·Wᵀ from the outputs, (g, m, m), where they were looked at; floored as C is."""
    if statistics.outputs is None:
        return None
    all_groups = []
    for covariance, w in zip(statistics.outputs.covariance, weight, strict=True):
        gram = w @ w.T
        whole = float(np.trace(gram))
        share = float(np.trace(covariance)) / whole if whole > 0 else 0.0
        all_groups.append(covariance + (_FLOOR * share or 1.0) * gram)
    return np.stack(all_groups)


def fit_layer(
    prepared: Prepared,
    name: str,
    choice: Choice,
    statistics: Statistics | None,
    effort: Effort = THOROUGH,
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
        else fit_to_inputs(graph_pass, layer, rank, statistics, effort)
    )
    with np.errstate(over="ignore"):
        factors = tuple(f.astype(layer.dtype.numpy()) for f in fitted)
    if not all(np.isfinite(f).all() for f in factors):
        raise ModelError(
            f"the factors of {name!r} at rank {list(rank)} are beyond what {layer.dtype.name} holds"
        )
    shift = None
    if statistics is not None and not graph_pass.at_load and layer.kind != "gather":
        shift = bias_shift(rest_of(graph_pass, layer, rank, factors), statistics.mean)
    return Factored(factors, shift)


def fit_matrix(
    graph_pass: GraphPass,
    layer: Layer,
    rank: Rank,
    weight: Array,
    moments: Sequence[Moments],
    metric: Array | None,
    effort: Effort,
    start: tuple[Array, ...] | None = None,
    outputs: Array | None = None,
) -> tuple[Array, ...]:
    """Factors that approximate a matrix, as ``fit_to_inputs`` does a layer's weight.

    Parameters
    ----------
    weight : ndarray of shape (g, m, n)
        What the factors stand for, outputs × inputs.
    moments : sequence of Moments
        Of the inputs of each group.
    metric : ndarray of shape (g, m, m), optional
        What errors of the outputs are multiplied by before they are squared.
    outputs : ndarray of shape (g, m, m), optional
        The covariance of what the matrix gives, where that is known better than by the moments.
    """
    form = graph_pass.form(layer)
    if graph_pass.shares and start is not None:
        return refit_shared(graph_pass, layer, rank, weight[0], moments[0], start)
    if form is None or not form.mixes:
        metric = None
    if metric is not None:
        metric = np.broadcast_to(metric, (len(weight), *metric.shape[1:]))
        weight = metric @ weight  # undone in the factor of the outputs, in the end
        outputs = None if outputs is None else metric @ outputs @ metric
    if form is not None and has_closed_form(form):
        empty = _empty(graph_pass, layer, rank)
        most = min(weight.shape[1], max(rank))
        leading = (
            [leading_outputs(w, c, most) for w, c in zip(weight, moments, strict=True)]
            if outputs is None
            else [leading_eigenvectors(c, most) for c in outputs]
        )
        groups = [
            closed_form(form, shapes, w, u)
            for shapes, w, u in zip(empty, weight, leading, strict=True)
        ]
        return graph_pass.pack(layer, rank, _turned(form, groups, metric, back=True))
    factors = start if start is not None else graph_pass.factorize(layer, rank)
    if form is None:
        return factors
    if weight.shape[2] > _WIDE:
        large = isinstance(moments[0], SampledMoments) and moments[0].rows.size > _MANY
        effort = Effort(max(1, effort.sweeps // (4 if large else 2)), effort.steps)
    starts = _turned(form, graph_pass.unpack(layer, rank, factors), metric)
    groups = [
        weighted_fit(form, group, w, c, effort.sweeps, effort.steps)[0]
        for group, w, c in zip(starts, weight, moments, strict=True)
    ]
    return graph_pass.pack(layer, rank, _turned(form, groups, metric, back=True))


def floored(covariance: Array) -> Array:
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
    energy = _energies(graph_pass, layer, statistics)
    tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return np.sqrt(tail / tail[0]) if tail[0] > 0 else np.zeros_like(tail)


def _energies(graph_pass: GraphPass, layer: Layer, statistics: Statistics) -> Array:
    """What each component of a closed form has of the energy of a layer's output."""
    if graph_pass.shares:
        metric = None if statistics.metric is None else statistics.metric[0]
        return shared_energies(layer, input_moments(statistics)[0], metric)
    whole = as_matrix(layer, layer.array())
    outputs, weight = output_covariance(statistics, whole), weighed(statistics, whole)
    if outputs is not None:
        metric = statistics.metric
        weighted = outputs if metric is None else metric @ outputs @ metric
        return np.asarray(np.maximum(np.linalg.eigvalsh(weighted)[:, ::-1], 0.0).sum(axis=0))
    moments = (
        [Covariance(c) for c in statistics.covariance]
        if len(statistics.covariance)
        else input_moments(statistics)
    )
    parts = [output_energies(w, c) for w, c in zip(weight, moments, strict=True)]
    return np.asarray(np.sum(parts, axis=0))


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

    It is exact for the inputs of the statistics, with a free bias; from a sample it is that of the
    rows that nothing was fitted to. Outputs are weighed by the metric of the statistics, if there
    is one: by how far later layers pass them on.
    """
    both = (weighed(statistics, w) for w in (rest, as_matrix(layer, layer.array())))
    apart, whole = (_output_energy(w, statistics) for w in both)
    return math.sqrt(max(apart, 0.0) / whole) if whole > 0 else 0.0


def _output_energy(weight: Array, statistics: Statistics) -> float:
    """tr(W·C·Wᵀ) over all groups."""
    if statistics.lookups is not None:
        return float(np.sum(np.square(weight) @ lookup_shares(statistics.lookups)))
    if statistics.sample is None:
        return float(np.sum((weight @ statistics.covariance) * weight))
    rows = statistics.sample[:, _fitted_rows(statistics.sample) :]
    outputs = rows @ weight.swapaxes(1, 2).astype(np.float32)
    return float(np.sum(np.square(outputs, dtype=np.float64)))


def bias_shift(rest: Array, mean: Array) -> Array:
    """(W − W̃)·μ for every output, of shape (g · m,): the bias has to make up for it."""
    return np.asarray(np.einsum("gmn,gn->gm", rest, mean).reshape(-1))
