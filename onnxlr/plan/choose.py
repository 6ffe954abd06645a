"""Choosing a method and a rank for every layer: as named, within a budget, or boldly."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from onnxlr.calibrate.budget import calibration_samples, sample_seconds
from onnxlr.candidates.candidate import Candidate
from onnxlr.candidates.fits import Fits
from onnxlr.errors import ModelError
from onnxlr.plan.budget import within_budget
from onnxlr.plan.evaluate import Evaluation, Evaluator
from onnxlr.plan.named import as_named
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.search import Boldest, Chosen, Trials, boldest, choices_of
from onnxlr.plan.tradeoff import Tradeoff
from onnxlr.plan.weigh import FEW_PROBES, PROBES, Aim, weigh
from onnxlr.system.cache import key_of
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency_table import LatencyTable

# Predicted squared relative errors of the model's outputs, among which a search bisects.
LOSSES = tuple(float(d) for d in np.logspace(-5, 0.5, 23))


def propose(evaluator: Evaluator, fits: Fits, table: LatencyTable | None) -> Proposal:
    """The boldest set of replacements that the accuracy limit allows on the saved file.

    Parameters
    ----------
    evaluator : Evaluator
    fits : Fits
    table : LatencyTable or None
        None where nothing runs.

    Raises
    ------
    BudgetError
        If a fraction of the original can't be reached within the limit.
    """
    options = evaluator.options
    if options.rank.kind != "auto" or evaluator.judge is None:
        named = as_named(evaluator.prepared, options, fits, table)
        searched = _searched(evaluator, [lambda: named.chosen])
        return replace(named, chosen=searched.chosen, reasons={**named.reasons, **searched.refused})
    assert table is not None
    tradeoff = _weighed(evaluator, fits, evaluator.judge, table)
    reasons = dict(fits.reasons)
    for name, row in tradeoff.layers.items():
        if (why := row.why_kept()) is not None:
            reasons[name] = why
    weighed = Proposal(
        {},
        reasons,
        {name: row.times for name, row in tradeoff.layers.items()},
        {name: row.alternatives() for name, row in tradeoff.layers.items()},
    )
    if options.fraction is not None:
        chosen, evaluation = within_budget(evaluator, tradeoff, options.fraction)
        return replace(weighed, chosen=chosen, evaluation=evaluation)
    searched = _searched(evaluator, [partial(_cheapest, tradeoff, loss) for loss in LOSSES])
    bolder, evaluated = _bolder(evaluator, tradeoff, searched.chosen)
    return replace(
        weighed, chosen=bolder, reasons={**reasons, **searched.refused}, evaluation=evaluated
    )


def _searched(evaluator: Evaluator, levels: list[Callable[[], Chosen]]) -> Boldest:
    """The boldest acceptable set among some levels, each trial shown."""
    with evaluator.progress.stage("choose and verify", None) as step:

        def verdict(chosen: Mapping[str, Candidate]) -> str | None:
            step(f"trial of {len(chosen)} layers")
            return _verdict(evaluator, chosen)

        return boldest(levels, Trials(verdict, evaluator.limits.trials))


def _verdict(evaluator: Evaluator, chosen: Mapping[str, Candidate]) -> str | None:
    """Why a set is not acceptable; None if it is."""
    try:
        variant = evaluator.factorizer.variant(choices_of(chosen))
        too_large = evaluator.too_large(evaluator.builder.build(variant))
        if too_large is not None or evaluator.judge is None:
            return too_large
        return evaluator.why_outside_limit(evaluator.evaluate(variant).quality)
    except ModelError as error:
        return str(error)


def _bolder(
    evaluator: Evaluator, tradeoff: Tradeoff, chosen: Chosen
) -> tuple[Chosen, Evaluation | None]:
    """Further levels of loss that only sequential correction brings within the limit."""
    if not evaluator.can_correct(choices_of(chosen)):
        return chosen, None
    saved, tried, evaluation = sum(c.saved for c in chosen.values()), 0, None
    for loss in LOSSES:
        more = _cheapest(tradeoff, loss)
        if sum(c.saved for c in more.values()) <= saved or more == chosen:
            continue
        if tried == evaluator.limits.bolder_levels:
            break
        attempt = evaluator.improved(choices_of(more))
        if evaluator.why_outside_limit(attempt.quality) is not None:
            break
        tried, chosen, evaluation = tried + 1, more, attempt
        saved = sum(c.saved for c in more.values())
    return chosen, evaluation


def _cheapest(tradeoff: Tradeoff, loss: float) -> Chosen:
    """The cheapest choice within a predicted loss."""
    return tradeoff.allocate(most_loss=loss) or {}


def _weighed(evaluator: Evaluator, fits: Fits, judge: Judge, table: LatencyTable) -> Tradeoff:
    """All candidates weighed; sensitivities come from samples that don't judge the result."""
    session, feeding = evaluator.session, evaluator.feeding
    assert session is not None
    assert feeding is not None
    options, prepared, limits = evaluator.options, evaluator.prepared, evaluator.limits
    probing, probes, samples = judge, FEW_PROBES, feeding.calibration
    origin: list[object] = [prepared.source.digest, prepared.input_shapes]
    if samples is not None:
        affordable = int(limits.probe_seconds / sample_seconds(prepared))
        probes = PROBES if affordable >= limits.probe_samples else FEW_PROBES
        count = min(limits.probe_samples, max(limits.probe_samples_least, affordable))
        probed = samples.take(count)
        fitted = calibration_samples(prepared, samples, limits)
        origin += [fitted.digest(), probed.digest()]
        with evaluator.progress.stage("run the original", None):
            probing = Judge(session, probed, "rel-error")
    passes = {fit.graph_pass.name: None for rows in fits.by_layer.values() for fit in rows}
    aim = Aim(
        tuple(passes),
        options.goal,
        options.latency_vetoes,
        limits.ranks,
        () if "sensitivity" in options.without else probes,
        evaluator.by_classes,
    )
    return weigh(
        fits.layers(prepared.layers),
        aim,
        evaluator.factorizer,
        probing,
        table,
        key_of(*origin, options.seed, options.machine),
        evaluator.progress,
    )
