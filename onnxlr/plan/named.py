"""Candidates at named ranks, or at a cautious error where nothing judges the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass

from onnxlr.candidates.candidate import Candidate, Saving
from onnxlr.candidates.fits import UNVERIFIED_AUTO_ERROR, Fits, auto_candidates, named_candidates
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.methods.choice import Choice
from onnxlr.options import Options
from onnxlr.plan.plan import Alternative
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.search import Chosen
from onnxlr.prepare.prepared import Prepared
from onnxlr.verify.defaults import layer_limit
from onnxlr.verify.latency_table import LatencyTable
from onnxlr.verify.layer_latency import CRASHED, LayerTime

_BOLDEST_ERROR = 0.9  # of a weight, where there is no limit
_TIMED_METHODS = 3  # of the methods that fit a layer, the most saving


@dataclass(frozen=True)
class _Ranked:
    """The candidates of a layer that may be written, best first, or why there are none."""

    candidates: Sequence[Candidate]
    reason: str
    times: dict[Choice, LayerTime]


def as_named(
    prepared: Prepared, options: Options, fits: Fits, table: LatencyTable | None
) -> Proposal:
    """Every layer's best candidate at the named ranks, or at a cautious error.

    Parameters
    ----------
    prepared : Prepared
    options : Options
    fits : Fits
    table : LatencyTable or None
        None where nothing runs.
    """
    sized = options.target in ("params", "bytes") or options.expand_at_load
    saving: Saving = "params" if sized else "macs"
    chosen: Chosen = {}
    reasons = dict(fits.reasons)
    times: dict[str, dict[Choice, LayerTime]] = {}
    alternatives: dict[str, tuple[Alternative, ...]] = {}
    for layer in fits.layers(prepared.layers):
        rows = [f for f in fits.by_layer[layer.name] if _is_meant(options, f.graph_pass)]
        candidates = (
            auto_candidates(layer, rows, _cautious_error(options), saving)
            if options.rank.kind == "auto"
            else named_candidates(layer, rows, options.rank, saving)
        )
        if isinstance(candidates, str):
            reasons[layer.name] = candidates
            continue
        ranked = _ranked(prepared, options, layer, candidates, table)
        times[layer.name] = ranked.times
        alternatives[layer.name] = tuple(
            _alternative(item, ranked.times.get(item.choice)) for item in candidates
        )
        if ranked.candidates:
            chosen[layer.name] = ranked.candidates[0]
        else:
            reasons[layer.name] = ranked.reason
    return Proposal(chosen, reasons, times, alternatives)


def _is_meant(options: Options, graph_pass: GraphPass) -> bool:
    """Whether a method takes part: where nothing is weighed, sharing has to be asked for.

    At one rank, siblings that share lose more than those that don't.
    """
    return not graph_pass.shares or graph_pass.name in options.methods


def _cautious_error(options: Options) -> float:
    """Error of a weight that is allowed where the whole model isn't judged."""
    if options.verify == "layers":
        return min(max(layer_limit(options.max_drop), 1e-6), _BOLDEST_ERROR)
    return UNVERIFIED_AUTO_ERROR


def _ranked(
    prepared: Prepared,
    options: Options,
    layer: Layer,
    candidates: Sequence[Candidate],
    table: LatencyTable | None,
) -> _Ranked:
    """The candidates that serve the target, best first."""
    if options.target == "macs":
        candidates = [c for c in candidates if (c.macs or 0) <= (layer.macs or 0)]
        if not candidates:
            return _Ranked((), "a lookup has no MACs, its replacement would add some", {})
    if options.latency_vetoes:
        assert table is not None
        return _fastest(prepared, layer, candidates, table)
    return _Ranked(candidates, "", {})


def _fastest(
    prepared: Prepared, layer: Layer, candidates: Sequence[Candidate], table: LatencyTable
) -> _Ranked:
    """The candidates that are measurably faster than the layer alone, fastest first.

    Those that only store factors come after them: nothing about them is faster.
    """
    paying: list[tuple[float, Candidate]] = []
    slow = []
    times: dict[Choice, LayerTime] = {}
    stored = [c for c in candidates if c.choice.graph_pass.at_load]
    for item in [c for c in candidates if c not in stored][:_TIMED_METHODS]:
        time = table.time(prepared.model, layer, item.choice)
        if time is None:
            paying.append((0.0, item))  # the whole model's timing will tell
            continue
        if time is not CRASHED:
            times[item.choice] = time
        if time.faster:
            paying.append((-time.saved_ms, item))
        else:
            slow.append(time.refusal(item.choice))
    paying.sort(key=lambda pair: pair[0])
    return _Ranked([item for _, item in paying] + stored, "; ".join(slow), times)


def _alternative(item: Candidate, time: LayerTime | None) -> Alternative:
    return Alternative(
        item.choice.graph_pass.name,
        item.choice.rank,
        item.params,
        item.macs,
        before_ms=None if time is None else time.before_ms,
        after_ms=None if time is None else time.after_ms,
    )
