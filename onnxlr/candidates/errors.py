"""What could replace a layer, with the error that each would make of its output."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.candidate import Candidate, Saving, by_sharing, candidate, saves
from onnxlr.candidates.fits import AUTO_ERRORS, Fit, auto_candidates, fit_methods
from onnxlr.candidates.fitting import (
    GLANCE,
    closed_errors,
    closes,
    fit_to_inputs,
    output_error,
    rest_of,
)
from onnxlr.decompose.ranks import round_up
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import weight_error
from onnxlr.methods.registry import find_pass
from onnxlr.prepare.prepared import Prepared
from onnxlr.types import Array

_CLOSED = 48  # ranks where one eigenvalue decomposition tells all errors
_FITTED = 3  # of the candidates of a method, to see what fitting leaves of an error
_SLACK = 1.6  # fitting brings errors down by less than this, as a rule


def candidate_row(item: Candidate) -> dict[str, Any]:
    """A candidate as it is cached: what doesn't follow from the method and the rank."""
    return {
        "method": item.choice.graph_pass.name,
        "rank": item.choice.rank,
        "error": item.error,
        "note": item.note,
    }


def candidate_from_row(layer: Layer, saving: Saving, row: Mapping[str, Any]) -> Candidate:
    """Read what ``candidate_row`` wrote.

    Raises
    ------
    LookupError, TypeError, ValueError, UsageError
        If it is something else.
    """
    graph_pass, rank = find_pass(row["method"]), tuple(int(r) for r in row["rank"])
    error = float(row["error"])
    misfit = graph_pass.refuse(layer) or graph_pass.misfit(layer, rank)
    if misfit is not None or not 0 <= error < math.inf:
        raise ValueError(misfit or f"an error of {error}")
    return replace(candidate(layer, graph_pass, rank, saving, str(row["note"])), error=error)


def layer_candidates(
    prepared: Prepared,
    name: str,
    methods: Sequence[str],
    saving: Saving,
    gridded: bool,
    statistics: Statistics | None,
    ranks: int,
) -> tuple[list[Candidate], str]:
    """Candidates of some methods from mild to bold, or why there are none.

    Parameters
    ----------
    prepared : Prepared
    name : str
        Of the layer.
    methods : sequence of str
    saving : {"params", "macs"}
        What is to be saved.
    gridded : bool
        Whether ranks are rounded up as kernels are.
    statistics : Statistics or None
        Of its inputs; without them errors are those of the weight.
    ranks : int
        Candidates of each method, at most.
    """
    layer = prepared.layer(name)
    fits, _ = fit_methods(layer, [find_pass(method) for method in methods])
    candidates: list[Candidate] = []
    why = ""
    for fit in _worthwhile(layer, fits, statistics):
        closed = statistics is not None and closes(fit.graph_pass, layer)
        if closed and (every := _every(layer, fit, saving, gridded)):
            candidates += every
            continue
        some: dict[Candidate, None] = {}
        for error in AUTO_ERRORS:
            within = auto_candidates(layer, (fit,), error, saving, gridded=gridded)
            if isinstance(within, list):
                some.update(dict.fromkeys(within))
            elif not candidates:
                why = within
        candidates += _thinned(list(some), ranks)
    if statistics is None:
        return [replace(item, error=_weight_error(layer, item)) for item in candidates], why
    return _with_output_errors(layer, candidates, statistics), why


def _worthwhile(layer: Layer, fits: Sequence[Fit], statistics: Statistics | None) -> Sequence[Fit]:
    """The methods without those that another makes superfluous whatever the rank."""
    if statistics is None or math.prod(layer.shape[2:]) > 1:
        return fits
    # A matrix has one best approximation of a rank, and a closed form that gives it.
    best = [f for f in fits if closes(f.graph_pass, layer) and not f.graph_pass.shares]
    rest = [f for f in fits if f.graph_pass.at_load or f.graph_pass.shares]
    return [*best[:1], *rest] if best else fits


def _weight_error(layer: Layer, item: Candidate) -> float:
    graph_pass, rank = item.choice.graph_pass, item.choice.rank
    return weight_error(layer, graph_pass, rank, graph_pass.factorize(layer, rank))


def _with_output_errors(
    layer: Layer, candidates: list[Candidate], statistics: Statistics
) -> list[Candidate]:
    """The candidates with the output errors that fitting leaves."""
    closed: dict[str, Array | None] = {}
    exact: list[Candidate] = []
    plain: list[Candidate] = []  # not fitted yet
    sketches: dict[Choice, tuple[Array, ...]] = {}
    for item in candidates:
        graph_pass, rank = item.choice.graph_pass, item.choice.rank
        if graph_pass.at_load:
            exact.append(replace(item, error=_weight_error(layer, item)))
            continue
        if graph_pass.name not in closed:
            closed[graph_pass.name] = closed_errors(graph_pass, layer, statistics)
        if (errors := closed[graph_pass.name]) is not None:
            exact.append(replace(item, error=float(errors[min(rank[0], len(errors) - 1)])))
            continue
        sketch = sketches[item.choice] = graph_pass.sketch(layer, rank)
        rest = rest_of(graph_pass, layer, rank, sketch)
        plain.append(replace(item, error=output_error(layer, rest, statistics)))
    # Fitting is dear: only methods that aren't far behind another at the same cost are fitted.
    close = {item.choice.graph_pass.name for item in front([*exact, *plain], _SLACK)}
    for method in sorted(close):
        group = [item for item in plain if item.choice.graph_pass.name == method]
        exact += _lowered(layer, group, sketches, statistics)
    return exact


def _lowered(
    layer: Layer,
    group: Sequence[Candidate],
    sketches: Mapping[Choice, tuple[Array, ...]],
    statistics: Statistics,
) -> list[Candidate]:
    """Candidates of one method with the errors that fitting leaves of them.

    Some are fitted. What share fitting leaves changes little from rank to rank: for the others it
    is interpolated over what they store.
    """
    ordered = sorted(group, key=lambda item: item.params)
    picked = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), _FITTED)).astype(int))
    sizes, shares = [], []
    for item in (ordered[i] for i in picked):
        graph_pass, rank = item.choice.graph_pass, item.choice.rank
        factors = fit_to_inputs(graph_pass, layer, rank, statistics, GLANCE, sketches[item.choice])
        error = output_error(layer, rest_of(graph_pass, layer, rank, factors), statistics)
        sizes.append(math.log(item.params))
        shares.append(error / item.error if item.error > 0 else 1.0)
    return [
        replace(item, error=item.error * float(np.interp(math.log(item.params), sizes, shares)))
        for item in ordered
    ]


def _every(layer: Layer, fit: Fit, saving: Saving, gridded: bool) -> list[Candidate]:
    """Candidates at ranks from 1 to break-even, evenly on a logarithmic scale.

    Where a closed form tells the error at every rank, many cost no more than one.
    """
    (limit,) = fit.limit
    ranks = np.unique(np.geomspace(1, max(limit, 1), _CLOSED).round().astype(int)).tolist()
    if gridded:
        ranks = sorted({round_up(r, limit) for r in ranks})
    return [
        candidate(layer, fit.graph_pass, (r,), saving)
        for r in reversed(ranks)
        if 0 < r <= limit and saves(layer, fit.graph_pass, (r,))
    ]


def _thinned(candidates: list[Candidate], most: int) -> list[Candidate]:
    """Some of many, spread evenly from the mildest to the boldest."""
    if len(candidates) <= most:
        return candidates
    return [candidates[i] for i in np.linspace(0, len(candidates) - 1, most).astype(int)]


def front(candidates: Sequence[Candidate], slack: float) -> list[Candidate]:
    """Those whose error is within a factor of the best at the same work or less."""
    within: list[Candidate] = []
    for rivals in by_sharing(candidates):
        best = math.inf
        for item in sorted(rivals, key=lambda item: (-item.saved, item.error)):
            if item.error < best * slack:
                within.append(item)
            best = min(best, item.error)
    return within
