"""Weighing candidates: their errors, their costs, and what they do to the model, measured."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxlr.candidates.candidate import Candidate, Saving
from onnxlr.candidates.errors import (
    candidate_from_row,
    candidate_row,
    front,
    layer_candidates,
)
from onnxlr.candidates.spectra import DECOMPOSING
from onnxlr.errors import UsageError
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import chain_macs, layer_work
from onnxlr.plan.knapsack import pareto
from onnxlr.plan.probing import measure_sensitivities, statistics_key
from onnxlr.plan.sensitivity import Sensitivity
from onnxlr.plan.tradeoff import LayerTradeoff, Tradeoff
from onnxlr.progress import Progress
from onnxlr.rewrite.factorizer import Factorizer
from onnxlr.system.cache import key_of
from onnxlr.system.time_limit import TimeLimit
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency_table import LatencyTable
from onnxlr.verify.layer_latency import CRASHED, LayerTime

# Relative output errors at which a layer's sensitivity is measured, and where time is short.
PROBES: tuple[float, ...] = (0.1, 0.25, 0.6)
FEW_PROBES: tuple[float, ...] = (0.25,)
_USUAL = 2e7  # parameters read in a millisecond, where nothing can be measured
_OUT_OF_SIGHT = (
    "MACs are only counted where shapes are known, and here they aren't, as in a body of If, Loop "
    "or Scan: --target params or a named --rank replaces it"
)
_PER_PARAMETER = 1e-9  # milliseconds that a parameter is worth: of equally fast the smaller


@dataclass(frozen=True)
class Aim:
    """What is weighed: the methods, what costs count, and whether slower candidates are dropped.

    Attributes
    ----------
    methods : tuple of str
    target : str
        ``latency``, ``macs``, ``params`` or ``bytes``.
    vetoed : bool
        Whether what isn't faster than its layer alone takes no part.
    ranks : int
        Candidates of each method for a layer.
    probes : tuple of float
        Errors at which sensitivities are measured; with none, an error counts the same everywhere.
    by_classes : bool
        Whether divergences of the class probabilities count, instead of the outputs' errors.
    """

    methods: tuple[str, ...]
    target: str
    vetoed: bool
    ranks: int
    probes: tuple[float, ...] = PROBES
    by_classes: bool = False

    @property
    def saving(self) -> Saving:
        """What candidates are ordered by."""
        return "params" if self.target in ("params", "bytes") else "macs"

    @property
    def gridded(self) -> bool:
        """Off the hardware's grid a rank takes as long as the next one on it."""
        return self.target == "latency"


@dataclass(frozen=True)
class _Priced:
    """A layer's candidates with their costs.

    ``as_is`` is what the layer costs, ``reason`` why nothing is left where nothing is.
    """

    as_is: float
    candidates: Sequence[Candidate]
    times: Mapping[Choice, LayerTime]
    reason: str


def weigh(
    layers: Sequence[Layer],
    aim: Aim,
    factorizer: Factorizer,
    judge: Callable[[], Judge],
    table: LatencyTable,
    origin: str,
    time: TimeLimit,
    progress: Progress,
    known: Mapping[str, Sensitivity],
) -> Tradeoff:
    """Candidates of some layers with their errors, costs and losses.

    Parameters
    ----------
    layers : sequence of Layer
        Those that some method fits.
    aim : Aim
    factorizer : Factorizer
        Has the statistics of the layers, the pool and the cache.
    judge : callable
        Gives the judge of the samples that sensitivities are measured on, where any is measured.
    table : LatencyTable
    origin : str
        Digest of the model and the samples: what is measured of them is cached.
    time : TimeLimit
    progress : Progress
    known : mapping of str to Sensitivity
        By layer name, sensitivities that need not be measured.
    """
    with progress.stage("weigh candidates", len(layers)) as step:
        considered = _consider(layers, aim, factorizer, origin, step)
    priced: dict[str, _Priced] = {}
    if aim.target == "latency":
        with progress.stage("time candidates", len(layers)) as step:
            for layer in layers:
                table.measures &= time.allows(0.35, "timings of candidates, estimated instead")
                candidates, why = considered[layer.name]
                priced[layer.name] = _timed(layer, candidates, why, aim, factorizer, table)
                with contextlib.suppress(OSError):  # told at the end, where it counts
                    table.save()  # now: a run that is killed has paid for it
                step(layer.name)
    else:
        priced = {layer.name: _counted(layer, *considered[layer.name], aim) for layer in layers}
    priced = {name: _unbeaten(item, aim) for name, item in priced.items()}
    offered = {name: item.candidates for name, item in priced.items() if item.candidates}
    sensitivities: dict[str, Sensitivity | str] = {**known}
    if unknown := {name: rows for name, rows in offered.items() if name not in known}:
        sensitivities |= measure_sensitivities(
            unknown, *(aim.probes, aim.by_classes, factorizer, judge(), origin, progress)
        )
    return Tradeoff(
        {
            layer.name: _with_losses(
                layer,
                priced[layer.name],
                considered[layer.name][0],
                sensitivities.get(layer.name),
            )
            for layer in layers
        }
    )


def _consider(
    layers: Sequence[Layer], aim: Aim, factorizer: Factorizer, origin: str, step: Any
) -> dict[str, tuple[list[Candidate], str]]:
    """Each layer's candidates with their errors, or why there are none; cached."""
    statistics, cache = factorizer.statistics, factorizer.cache
    key = key_of(
        origin, aim.methods, aim.saving, aim.gridded, aim.ranks, statistics_key(factorizer)
    )
    rows = cache.read("candidates", key)
    considered: dict[str, tuple[list[Candidate], str]] = {}
    for layer in layers:
        if (cached := _from_rows(layer, aim.saving, rows.get(layer.name))) is not None:
            considered[layer.name] = cached
            step(layer.name)
    missing = [layer for layer in layers if layer.name not in considered]
    items = [
        (
            *(layer.name, aim.methods, aim.saving, aim.gridded),
            *(statistics.get(layer.name), aim.ranks),
        )
        for layer in missing
    ]
    needs = DECOMPOSING * max((layer.params for layer in missing), default=0)
    results = factorizer.pool.map(layer_candidates, items, factorizer.prepared, needs=needs)
    for layer, (candidates, why) in zip(missing, results, strict=True):
        considered[layer.name] = candidates, why
        rows[layer.name] = {"candidates": [candidate_row(c) for c in candidates], "why": why}
        cache.write("candidates", key, rows)
        step(layer.name)
    return considered


def _from_rows(layer: Layer, saving: Saving, row: Any) -> tuple[list[Candidate], str] | None:
    """What the cache has of a layer; None where it has nothing, or what nobody here wrote."""
    try:
        candidates = [candidate_from_row(layer, saving, item) for item in row["candidates"]]
    except (LookupError, TypeError, ValueError, UsageError):
        return None
    return (candidates, row["why"]) if isinstance(row.get("why"), str) else None


def _counted(layer: Layer, candidates: Sequence[Candidate], why: str, aim: Aim) -> _Priced:
    """Candidates with counted costs."""
    if aim.target == "macs":
        visible = layer.in_sight
        if not visible.uses:
            return _Priced(0, [], {}, why if not candidates else _OUT_OF_SIGHT)
        as_is = float(visible.macs or 0)
        costs: list[float] = [_macs_in_sight(layer, visible, item) for item in candidates]
    else:
        size = layer.dtype.itemsize if aim.target == "bytes" else 1
        as_is, costs = layer.params * size, [item.params * size for item in candidates]
    priced = [replace(c, cost=cost) for c, cost in zip(candidates, costs, strict=True)]
    return _Priced(as_is, priced, {}, "" if candidates else why)


def _macs_in_sight(layer: Layer, visible: Layer, item: Candidate) -> int:
    """Multiply-accumulates of a candidate at the users whose shapes are known."""
    if visible is layer:
        return item.macs or 0
    return chain_macs(visible, item.choice.graph_pass, item.choice.rank) or 0


def _timed(
    layer: Layer,
    considered: Sequence[Candidate],
    why: str,
    aim: Aim,
    factorizer: Factorizer,
    table: LatencyTable,
) -> _Priced:
    """Candidates with measured milliseconds; a little is added for every parameter that is read.

    Where nothing can be measured (a layer in a body) work decides, at a usual speed.
    """
    items = front(considered, 1.0)
    chains = [c.choice for c in items if not c.choice.graph_pass.at_load]
    measured = table.times(factorizer.prepared.model, layer, chains)
    shares: list[tuple[Candidate, float]] = []  # of the layer's time
    times: dict[Choice, LayerTime] = {}
    before, slow = [], []
    for item in items:
        time = measured.get(item.choice)
        if time is None:
            share = 1.0 if item.choice.graph_pass.at_load else _share_of_work(layer, item)
        elif time is CRASHED:
            slow.append((time.after_ms / time.before_ms, time.refusal(item.choice)))
            continue
        else:
            times[item.choice] = time
            before.append(time.before_ms)
            share = time.after_ms / time.before_ms
        if time is None or time.faster or not aim.vetoed:
            shares.append((item, share))
        else:
            slow.append((time.after_ms / time.before_ms, time.refusal(item.choice)))
    # One time for the layer as it is, so that the noise of many measurements doesn't choose.
    whole = float(np.median(before)) if before else _usual_ms(layer)
    return _Priced(
        whole + _PER_PARAMETER * layer.params,
        [replace(c, cost=share * whole + _PER_PARAMETER * c.params) for c, share in shares],
        times,
        min(slow)[1] if slow and not shares else "" if considered else why,
    )


def _usual_ms(layer: Layer) -> float:
    work = layer_work(layer)
    return work.usual_ms if work is not None else layer.params / _USUAL


def _share_of_work(layer: Layer, item: Candidate) -> float:
    """What a candidate does of a layer's work; of its reading, where that does none."""
    if layer.macs and item.macs is not None:
        return item.macs / layer.macs
    return item.params / layer.params


def _unbeaten(priced: _Priced, aim: Aim) -> _Priced:
    """Those candidates that none beats in both cost and error, and that save something."""
    by_error = [replace(c, loss=c.error**2) for c in priced.candidates]
    candidates = pareto(by_error, priced.as_is)
    reason = priced.reason
    if priced.candidates and not candidates:
        reason = reason or f"no rank of any method saves {aim.target} here"
    return replace(priced, candidates=candidates, reason=reason)


def _with_losses(
    layer: Layer,
    priced: _Priced,
    considered: Sequence[Candidate],
    sensitivity: Sensitivity | str | None,
) -> LayerTradeoff:
    """A layer's candidates with what their errors do to the model."""
    candidates: list[Candidate] = []
    reason = priced.reason
    if isinstance(sensitivity, str):
        reason, sensitivity = sensitivity, None
    elif sensitivity is not None:
        losses = [(c, sensitivity.loss(math.sqrt(c.loss))) for c in priced.candidates]
        candidates = [replace(c, loss=loss) for c, loss in losses if math.isfinite(loss)]
        if not candidates:
            reason = reason or "where it is zero, or nearly, the model's outputs aren't finite"
    return LayerTradeoff(
        layer,
        priced.as_is,
        tuple(considered),
        tuple(candidates),
        priced.times,
        sensitivity,
        "" if candidates else reason,
    )
