"""What could replace a layer, with the error that each would make of its output."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.fits import (
    AUTO_ERRORS,
    Candidate,
    Fit,
    Goal,
    auto_candidates,
    candidate,
    fit_methods,
    saves,
)
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
from onnxlr.methods.base import WeightPass
from onnxlr.methods.cost import weight_error
from onnxlr.methods.registry import find_pass
from onnxlr.prepare.prepared import Prepared
from onnxlr.types import Array

_RANKS = 8  # of each method for a layer
_CLOSED = 48  # ranks where all errors are known at once
_FITTED = 3  # of the candidates of a method, to see what fitting leaves of an error
_SLACK = 1.6  # fitting brings errors down by less than this, as a rule


@dataclass(frozen=True)
class Weighed:
    """A candidate with the relative error of the layer's output that it would make."""

    candidate: Candidate
    error: float

    def to_json(self) -> dict[str, Any]:
        """What doesn't follow from the method and the rank."""
        choice = self.candidate.choice
        return {
            "method": choice.graph_pass.name,
            "rank": choice.rank,
            "error": self.error,
            "note": self.candidate.note,
        }

    @classmethod
    def from_json(cls, layer: Layer, goal: Goal, row: Mapping[str, Any]) -> "Weighed":
        """Read what ``to_json`` wrote.

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
        return cls(candidate(layer, graph_pass, rank, goal, str(row["note"])), error)


def weigh_layer(
    prepared: Prepared,
    name: str,
    methods: Sequence[str],
    goal: Goal,
    gridded: bool,
    statistics: Statistics | None,
    ranks: int | None = None,
) -> tuple[list[Weighed], str]:
    """Candidates of some methods from mild to bold, or why there are none.

    Parameters
    ----------
    prepared : Prepared
    name : str
        Of the layer.
    methods : sequence of str
    goal : {"params", "macs"}
        What is to be saved.
    gridded : bool
        Whether ranks are rounded up as kernels are.
    statistics : Statistics or None
        Of its inputs; without them errors are those of the weight.
    ranks : int, optional
        Of each method, at most.
    """
    layer = prepared.layer(name)
    fits, _ = fit_methods(layer, [find_pass(method) for method in methods])
    found: list[Candidate] = []
    why = ""
    for fit in _worthwhile(layer, fits, statistics):
        closed = statistics is not None and closes(fit.graph_pass, layer, fit.full)
        if closed and (every := _every(layer, fit, goal, gridded)):
            found += every
            continue
        some: dict[Candidate, None] = {}
        for error in AUTO_ERRORS:
            within = auto_candidates(layer, (fit,), error, goal, gridded=gridded)
            if isinstance(within, list):
                some.update(dict.fromkeys(within))
            elif not found:
                why = within
        found += _thinned(list(some), ranks or _RANKS)
    if statistics is None:
        return [Weighed(item, _weight_error(layer, item)) for item in found], why
    return _fitted(layer, found, statistics), why


def _worthwhile(layer: Layer, fits: Sequence[Fit], statistics: Statistics | None) -> Sequence[Fit]:
    """The methods without those that another makes superfluous whatever the rank."""
    if statistics is None or math.prod(layer.shape[2:]) > 1:
        return fits
    # A matrix has one best approximation of a rank, and a closed form that gives it.
    best = [f for f in fits if closes(f.graph_pass, layer, f.full)]
    rest = [f for f in fits if isinstance(f.graph_pass, WeightPass)]
    return [*best[:1], *rest] if best else fits


def _weight_error(layer: Layer, item: Candidate) -> float:
    graph_pass, rank = item.choice.graph_pass, item.choice.rank
    return weight_error(layer, graph_pass, rank, graph_pass.factorize(layer, rank))


def _fitted(layer: Layer, found: list[Candidate], statistics: Statistics) -> list[Weighed]:
    """The candidates with the output errors that fitting leaves."""
    told: dict[str, Array | None] = {}
    done, plain, starts = [], [], {}
    for item in found:
        graph_pass, rank = item.choice.graph_pass, item.choice.rank
        if isinstance(graph_pass, WeightPass):
            done.append(Weighed(item, _weight_error(layer, item)))
            continue
        if graph_pass.name not in told:
            told[graph_pass.name] = closed_errors(graph_pass, layer, statistics)
        if (errors := told[graph_pass.name]) is not None:
            done.append(Weighed(item, float(errors[min(rank[0], len(errors) - 1)])))
            continue
        starts[item] = graph_pass.sketch(layer, rank)
        rest = rest_of(graph_pass, layer, rank, starts[item])
        plain.append(Weighed(item, output_error(layer, rest, statistics)))
    # Fitting is dear: only methods that aren't far behind another at the same cost are fitted.
    close = {w.candidate.choice.graph_pass.name for w in front([*done, *plain], _SLACK)}
    for method in sorted(close):
        group = [w for w in plain if w.candidate.choice.graph_pass.name == method]
        done += _lowered(layer, group, starts, statistics)
    return done


def _lowered(
    layer: Layer,
    group: Sequence[Weighed],
    starts: Mapping[Candidate, tuple[Array, ...]],
    statistics: Statistics,
) -> list[Weighed]:
    """Candidates of one method with the errors that fitting leaves of them.

    Some are fitted. What share fitting leaves changes little from rank to rank: for the others it
    is interpolated over what they store.
    """
    ordered = sorted(group, key=lambda w: w.candidate.params)
    picked = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), _FITTED)).astype(int))
    sizes, shares = [], []
    for weighed in (ordered[i] for i in picked):
        item = weighed.candidate
        graph_pass, rank = item.choice.graph_pass, item.choice.rank
        factors = fit_to_inputs(graph_pass, layer, rank, statistics, GLANCE, starts[item])
        error = output_error(layer, rest_of(graph_pass, layer, rank, factors), statistics)
        sizes.append(math.log(item.params))
        shares.append(error / weighed.error if weighed.error > 0 else 1.0)
    return [
        Weighed(
            w.candidate, w.error * float(np.interp(math.log(w.candidate.params), sizes, shares))
        )
        for w in ordered
    ]


def _every(layer: Layer, fit: Fit, goal: Goal, gridded: bool) -> list[Candidate]:
    """Candidates at ranks from 1 to break-even, evenly on a logarithmic scale.

    Where a closed form tells the error at every rank, many cost no more than one.
    """
    (limit,) = fit.limit
    ranks = np.unique(np.geomspace(1, max(limit, 1), _CLOSED).round().astype(int)).tolist()
    if gridded:
        ranks = sorted({round_up(r, limit) for r in ranks})
    return [
        candidate(layer, fit.graph_pass, (r,), goal)
        for r in reversed(ranks)
        if 0 < r <= limit and saves(layer, fit.graph_pass, (r,))
    ]


def _thinned(found: list[Candidate], most: int) -> list[Candidate]:
    """Some of many, spread evenly from the mildest to the boldest."""
    if len(found) <= most:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, most).astype(int)]


def front(weighed: Sequence[Weighed], slack: float) -> list[Weighed]:
    """Those whose error is within a factor of the best at the same work or less."""
    ordered = sorted(weighed, key=lambda w: (-w.candidate.saved, w.error))
    kept, best = [], math.inf
    for item in ordered:
        if item.error < best * slack:
            kept.append(item)
        best = min(best, item.error)
    return kept
