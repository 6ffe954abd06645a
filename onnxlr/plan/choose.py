"""Chooses a method and a rank for every layer: as named, within a budget, or within the limit."""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import numpy as np

from onnxlr.calibrate.budget import (
    affordable_samples,
    calibration_samples,
    probed_samples,
    sample_seconds,
)
from onnxlr.candidates.candidate import Candidate
from onnxlr.candidates.fits import Fits
from onnxlr.errors import ModelError
from onnxlr.plan.budget import within_budget
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.in_place import corrected, is_timed_in_place, time_in_place
from onnxlr.plan.named import as_named
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.search import Boldest, Chosen, Trials, choices_of, climbed, highest
from onnxlr.plan.sensitivity import Sensitivity
from onnxlr.plan.tradeoff import Tradeoff
from onnxlr.plan.weigh import FEW_PROBES, PROBES, Aim, weigh
from onnxlr.prepare.samples import Samples
from onnxlr.system.cache import key_of
from onnxlr.verify.latency_table import LatencyTable

# A trial takes so long for any model, and a second more for so many bytes.
_TRIAL_SECONDS, _WRITTEN = 0.5, 1e8
_BEHIND = 3  # times that, with ``--behind``: a copy is made, and another file of it
# Predicted squared relative errors of the model's outputs, among which a search bisects.
LOSSES = tuple(float(d) for d in np.logspace(-5, 0.5, 23))


def propose(
    evaluator: Evaluator, fits: Fits, table: LatencyTable | None, former: Proposal | None = None
) -> Proposal:
    """A set of replacements that the samples that choose find within the limit, and its neighbours.

    Parameters
    ----------
    evaluator : Evaluator
    fits : Fits
    table : LatencyTable or None
        None where nothing runs.
    former : Proposal, optional
        Of the model with all of its channels: this search begins at the level at which that one
        ended, and takes its sensitivities. They say what a relative error of a layer's output does
        to the model, which fewer channels hardly change.

    Raises
    ------
    BudgetError
        If a fraction of the original can't be reached within the limit.
    """
    options = evaluator.options
    if options.rank.kind != "auto" or evaluator.judge is None:
        named = as_named(evaluator.prepared, options, fits, table)
        with _trials(evaluator) as trials:
            alone = [lambda: named.chosen]
            searched = climbed(alone, highest(alone, trials), trials)
        return replace(
            named,
            chosen=searched.chosen or (named.chosen if evaluator.verdicts.is_tested else {}),
            reasons={**named.reasons, **searched.refused},
            sets=partial(_nested, evaluator, named.chosen),
        )
    assert table is not None
    known = {} if former is None else former.sensitivities
    tradeoff = _weighed(evaluator, fits, table, known)
    if options.fraction is not None:
        chosen, evaluation = within_budget(evaluator, tradeoff, options.fraction)
        return replace(_told(fits, tradeoff), chosen=chosen, evaluation=evaluation)
    near = None if former is None else former.level
    searched, tradeoff = _searched_in_place(evaluator, tradeoff, near)
    chosen = searched.chosen
    if not chosen and evaluator.verdicts.is_tested:  # by chance, where samples are few
        chosen = next((mild for item in _levels(tradeoff) if (mild := item())), {})
    weighed = _told(fits, tradeoff)
    return replace(
        weighed,
        chosen=chosen,
        reasons={**weighed.reasons, **searched.refused},
        sets=lambda names: [_cheapest(tradeoff, loss, names) for loss in LOSSES],
        level=searched.level if searched.level >= 0 else None,
    )


def _told(fits: Fits, tradeoff: Tradeoff) -> Proposal:
    """What was learned by weighing, with nothing chosen."""
    rows = tradeoff.layers
    why = {name: reason for name, row in rows.items() if (reason := row.why_kept()) is not None}
    return Proposal(
        {},
        {**fits.reasons, **why},
        {name: row.times for name, row in rows.items()},
        {name: row.alternatives() for name, row in rows.items()},
        {name: row.more_ms for name, row in rows.items() if row.more_ms},
        sensitivities={n: row.sensitivity for n, row in rows.items() if row.sensitivity},
    )


def _searched_in_place(
    evaluator: Evaluator, tradeoff: Tradeoff, near: int | None = None
) -> tuple[Boldest, Tradeoff]:
    """The boldest acceptable set, with costs put right by what the set saves in the model."""
    levels = _levels(tradeoff)
    with _trials(evaluator) as trials:
        level = highest(levels, trials, near)
    for _ in range(evaluator.limits.in_place_rounds if is_timed_in_place(evaluator) else 0):
        if level < 0 or not evaluator.time.allows(0.5, "timing within the model"):
            break
        chosen = levels[level]()
        found = time_in_place(evaluator, tradeoff, chosen) if chosen else None
        if found is None:
            break
        tradeoff = corrected(tradeoff, found, chosen)
        levels = _levels(tradeoff)
        with _trials(evaluator) as again:
            level = highest(levels, again, near=level)
    with _trials(evaluator, trials.made) as rest:
        return climbed(levels, level, rest), tradeoff


def _levels(tradeoff: Tradeoff) -> list[Callable[[], Chosen]]:
    """The cheapest choices within rising predicted losses, each computed when it is asked for."""
    return [cache(partial(_cheapest, tradeoff, loss)) for loss in LOSSES]


@contextmanager
def _trials(evaluator: Evaluator, made: int = 0) -> Iterator[Trials]:
    """Trials on the saved file, each shown; fewer where some were made."""
    with evaluator.progress.stage("choose and verify", None) as step:

        def verdict(chosen: Mapping[str, Candidate]) -> str | None:
            step(f"trial of {len(chosen)} layers")
            return _verdict(evaluator, chosen)

        limits, most = evaluator.limits, _most_trials(evaluator)
        may_go_on = partial(evaluator.time.allows, 0.55, "further trials")
        yield Trials(verdict, max(limits.trials_least, most - made), may_go_on, limits.trials_least)


def _most_trials(evaluator: Evaluator) -> int:
    """How many sets there is time to judge, estimated from the work."""
    limits, feeding = evaluator.limits, evaluator.feeding
    samples = feeding.choose if feeding is not None else None
    count = len(samples) if isinstance(samples, Samples) else 1
    if evaluator.judge is not None and (metric := evaluator.judge.user) is not None:
        count += metric.samples  # which it runs by itself
    writing = _TRIAL_SECONDS + evaluator.original.source.nbytes / _WRITTEN
    if evaluator.finish is not None:
        writing *= _BEHIND
    affordable = limits.trial_seconds / (writing + count * sample_seconds(evaluator.original))
    return max(limits.trials, min(limits.trials_most, int(affordable)))


def _verdict(evaluator: Evaluator, chosen: Mapping[str, Candidate]) -> str | None:
    """Why a set is not acceptable; None if it is."""
    try:
        variant = evaluator.factorizer.variant(choices_of(chosen))
        if evaluator.judge is None:
            return evaluator.verdicts.too_large(evaluator.builder.build(variant).nbytes)
        evaluation = evaluator.evaluate(variant)
        too_large = evaluator.verdicts.too_large(evaluation.nbytes)
        return too_large or evaluator.verdicts.why_unlikely(evaluation.quality)
    except ModelError as error:
        return str(error)


def _nested(evaluator: Evaluator, chosen: Chosen, names: Set[str]) -> list[Chosen]:
    """Parts of a set, each twice as large as the one before: the layers with the least errors."""
    factorizer = evaluator.factorizer
    variant = factorizer.variant(choices_of(chosen))

    def error(name: str) -> float:
        layer = evaluator.prepared.layer(name)
        of_output = variant.output_error(layer, factorizer.statistics.get(name))
        return variant.weight_error(layer) if of_output is None else of_output

    order = sorted((name for name in chosen if name in names), key=error)
    sizes = [len(order) >> shift for shift in range(len(order).bit_length())]
    return [{name: chosen[name] for name in order[:size]} for size in reversed(sizes)]


def _cheapest(tradeoff: Tradeoff, loss: float, names: Set[str] | None = None) -> Chosen:
    """The cheapest choice within a predicted loss, among some layers or all."""
    return tradeoff.allocate(most_loss=loss, names=names) or {}


def _weighed(
    evaluator: Evaluator, fits: Fits, table: LatencyTable, known: Mapping[str, Sensitivity]
) -> Tradeoff:
    """All candidates weighed; sensitivities come from samples that don't judge the result."""
    feeding = evaluator.feeding
    options, prepared, limits = evaluator.options, evaluator.prepared, evaluator.limits
    origin: list[object] = [prepared.source.digest, prepared.input_shapes]
    assert feeding is not None
    if (samples := feeding.fit) is not None:
        fitted = calibration_samples(evaluator.original, samples, limits)
        origin += [fitted.digest(), probed_samples(prepared, samples, limits).digest()]
    affordable = affordable_samples(prepared, limits.probe_seconds)
    many = samples is not None and affordable >= limits.probe_samples
    probes = PROBES if many else FEW_PROBES
    passes = {fit.graph_pass.name: None for rows in fits.by_layer.values() for fit in rows}
    aim = Aim(
        tuple(passes),
        options.goal,
        options.latency_vetoes,
        limits.ranks,
        () if "sensitivity" in options.without else probes,
        evaluator.verdicts.by_classes,
    )
    return weigh(
        fits.layers(prepared.layers),
        aim,
        evaluator.factorizer,
        lambda: evaluator.probing,
        table,
        key_of(*origin, options.seed, options.machine),
        evaluator.time,
        evaluator.progress,
        known,
    )
