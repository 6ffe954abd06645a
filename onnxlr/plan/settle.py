"""The proposed set measured once more on the saved file, and put back until it pays."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from onnxlr.errors import BudgetError
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.plan import Alternative
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.search import Chosen, choices_of
from onnxlr.prepare.samples import Samples
from onnxlr.rewrite.variant import Variant
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.latency import Comparison
from onnxlr.verify.layer_latency import LayerTime
from onnxlr.verify.layers_alone import check_layers, worst

_CHECKED_FEEDS = 4  # that layers are compared alone on


@dataclass(frozen=True)
class Selection:
    """What is handed over, what it comes to, and why the other layers stay.

    Attributes
    ----------
    chosen : dict of str to Candidate
        By layer name.
    reasons : mapping of str to str
        Why a layer that isn't chosen stays as it is.
    variant : Variant
        The chosen set with its factors.
    quality : Quality or None
        Measured on the saved file, or layer by layer; None where nothing was judged.
    speed : Comparison or None
        The original and the saved file in turn; None where nothing was timed.
    alternatives : mapping of str to tuple of Alternative
        By layer name, all that was weighed.
    times : mapping of str to LayerTime
        Of the chosen replacements that were timed, each alone.
    """

    chosen: Chosen
    reasons: Mapping[str, str]
    variant: Variant
    quality: Quality | None
    speed: Comparison | None
    alternatives: Mapping[str, tuple[Alternative, ...]]
    times: Mapping[str, LayerTime]


def settle(evaluator: Evaluator, proposal: Proposal) -> Selection:
    """Measure the saved file of a proposal once more; put back layers until it pays, or all.

    Raises
    ------
    BudgetError
        If a budget was asked for, and what meets it is outside the limit.
    """
    if evaluator.options.verify == "layers":
        return _settle_alone(evaluator, proposal)
    if evaluator.judge is None or evaluator.session is None:
        return _selection(evaluator, proposal, proposal.chosen, None, None)
    chosen, evaluation = proposal.chosen, proposal.evaluation
    put_back: dict[str, str] = {}
    while chosen:
        if evaluation is None:
            evaluation = evaluator.improved(choices_of(chosen))
        built = evaluator.builder.build(evaluation.variant)
        why = evaluator.too_large(built) or evaluator.why_outside_limit(evaluation.quality)
        if why is not None and evaluator.options.fraction is not None:
            raise BudgetError(f"the budget can't be met: {why}")
        speed = None
        if why is None and evaluator.timed:
            with evaluator.progress.stage(f"time {len(chosen)} replaced layers", None):
                speed = evaluator.compare(built)
            why = _too_slow(evaluator, chosen, speed)
        if why is None:
            return _selection(
                evaluator, proposal, chosen, evaluation.quality, speed, put_back, evaluation.variant
            )
        items = chosen
        ranked = sorted(items, key=lambda name: proposal.worth(name, items[name]))
        half = len(ranked) // 2
        put_back |= dict.fromkeys(ranked[half:], f"put back: {why}")
        chosen, evaluation = {name: items[name] for name in ranked[:half]}, None
    with evaluator.progress.stage("verify", None):
        quality = evaluator.judge.judge(evaluator.session)
        speed = evaluator.compare(None) if evaluator.timed else None
    return _selection(evaluator, proposal, {}, quality, speed, put_back)


def _too_slow(evaluator: Evaluator, chosen: Chosen, speed: Comparison) -> str | None:
    """Why latency vetoes a set, if it may."""
    # What only makes the file smaller has to be no slower, the rest has to be faster.
    stored = any(c.choice.graph_pass.at_load for c in chosen.values())
    enough = ("faster", "within noise") if stored else ("faster",)
    if not evaluator.options.latency_vetoes or speed.verdict in enough:
        return None
    return (
        f"the whole model is {'slower' if stored else 'not measurably faster'} with it "
        f"({speed.speedup:.2f}×, 95% {speed.low:.2f} to {speed.high:.2f})"
    )


def _settle_alone(evaluator: Evaluator, proposal: Proposal) -> Selection:
    """Put back every layer that alone is outside the limit."""
    feeding, feeds = evaluator.feeding, []
    if feeding is not None and isinstance(feeding.validation, Samples):
        samples = feeding.validation.take(_CHECKED_FEEDS * feeding.validation.batch)
        feeds = [feed for feed, _, _ in itertools.islice(samples.batches(), _CHECKED_FEEDS)]
    qualities, crashed = check_layers(
        evaluator.prepared,
        evaluator.factorizer.variant(choices_of(proposal.chosen)),
        feeds,
        evaluator.options.seed,
        evaluator.progress,
    )
    put_back = {name: f"put back: {why}" for name, why in crashed.items()}
    passed = {}
    for name, quality in qualities.items():
        if (why := evaluator.why_outside_limit(quality)) is None:
            passed[name] = quality
        else:
            put_back[name] = f"put back: {why}"
    chosen = {name: proposal.chosen[name] for name in passed}
    return _selection(evaluator, proposal, chosen, worst(passed), None, put_back)


def _selection(
    evaluator: Evaluator,
    proposal: Proposal,
    chosen: Chosen,
    quality: Quality | None,
    speed: Comparison | None,
    put_back: Mapping[str, str] | None = None,
    variant: Variant | None = None,
) -> Selection:
    layers = evaluator.prepared.layers
    reasons = {**proposal.reasons, **(put_back or {})}
    return Selection(
        chosen,
        {
            layer.name: reasons.get(layer.name) or "no method was chosen"
            for layer in layers
            if layer.name not in chosen
        },
        variant or evaluator.factorizer.variant(choices_of(chosen)),
        quality,
        speed,
        proposal.alternatives,
        {
            layer.name: time
            for layer in layers
            if layer.name in chosen
            and (time := proposal.time(layer, chosen[layer.name])) is not None
        },
    )
