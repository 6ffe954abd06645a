"""Candidate models from mild to bold, made without the test samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from onnxlr.calibrate.budget import sample_seconds
from onnxlr.errors import BudgetError, ModelError
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.judged import Evaluation
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.search import Chosen, choices_of
from onnxlr.plan.verdicts import put_back_reasons
from onnxlr.rewrite.variant import Variant
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.latency import Comparison

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rung:
    """A model of the ladder.

    Attributes
    ----------
    chosen : dict of str to Candidate
        By layer name.
    evaluation : Evaluation
        The same with factors, and its quality on the samples that choose.
    proposal : Proposal
        What was learned by the search that led to it.
    """

    chosen: Chosen
    evaluation: Evaluation
    proposal: Proposal

    @property
    def variant(self) -> Variant:
        """The set with its factors."""
        return self.evaluation.variant

    @property
    def quality(self) -> Quality:
        """On the samples that choose."""
        return self.evaluation.quality


@dataclass(frozen=True)
class Ladder:
    """Models from mild to bold, each losing more than the one before as far as is predicted.

    Attributes
    ----------
    proposal : Proposal
        What is known of layers where none of the models is handed over.
    rungs : tuple of Rung
    """

    proposal: Proposal
    rungs: tuple[Rung, ...] = ()

    @property
    def largest_difference(self) -> float:
        """The largest loss or gain of a sample that chooses, by any of the models."""
        losses = [item for rung in self.rungs for item in rung.quality.losses]
        return max((item.largest for item in losses), default=0.0)


def begin_ladder(evaluator: Evaluator, proposal: Proposal) -> Ladder:
    """The model that a search found, without the layers with which it isn't faster.

    It is corrected in sequence if that improves it. Nothing here, nor in ``with_others``,
    looks at the test samples.

    Raises
    ------
    BudgetError
        If a budget was asked for, and the file of what meets it is too large.
    """
    if evaluator.judge is None or evaluator.options.verify != "full":
        return Ladder(proposal)
    model, proposal = _paying(evaluator, proposal)
    return Ladder(proposal, () if model is None else (model,))


def with_others(evaluator: Evaluator, ladder: Ladder) -> Ladder:
    """The same ladder with milder and bolder models of the layers that its model replaces.

    They are corrected in sequence if that model is, as far as there is time.
    """
    if not ladder.rungs:
        return ladder
    (middle,), proposal = ladder.rungs, ladder.proposal
    sets = _distinct(proposal.sets(middle.chosen.keys()), middle.chosen)
    saved = _saved(middle.chosen)
    milder = [chosen for chosen in sets if _saved(chosen) < saved]
    bolder = [chosen for chosen in sets if _saved(chosen) > saved]
    limits, sequential = evaluator.limits, middle.variant.sequential
    if not evaluator.verdicts.is_tested:  # the samples that chose have the last word, and gave it
        milder, bolder = [], bolder if sequential else []
    mild, bold = [], []
    seconds = limits.ladder_seconds
    for i, chosen in enumerate(thinned(milder, most_rungs(evaluator) - 1)):
        if not evaluator.time.allows(0.75, "further models to test"):
            break
        # Correcting takes long, and the mildest have less need of it.
        needed = _seconds(evaluator, chosen, sequential)
        corrected = i == 0 or (i < limits.corrected_rungs and needed <= seconds)
        seconds -= needed if corrected else 0.0
        rung = _rung(evaluator, proposal, chosen, sequential if corrected else 0)
        if rung is not None:
            mild.append(rung)
    for chosen in bolder[: limits.bolder_levels]:
        seconds -= _seconds(evaluator, chosen, sequential)
        if seconds < 0.0 or not evaluator.time.allows(0.8, "bolder models"):
            break
        rung = _rung(evaluator, proposal, chosen, sequential)
        if rung is None or evaluator.verdicts.why_ruled_out(rung.quality) is not None:
            break
        bold.append(rung)
    return Ladder(proposal, (*reversed(mild), middle, *bold))


def _seconds(evaluator: Evaluator, chosen: Chosen, sequential: int) -> float:
    """Seconds that correcting a set takes, estimated from the work; 0 if it isn't corrected."""
    return evaluator.correction_seconds(sequential, len(chosen)) if sequential else 0.0


def _saved(chosen: Chosen) -> int:
    """What a set saves, in counted work."""
    return sum(item.saved for item in chosen.values())


def most_rungs(evaluator: Evaluator) -> int:
    """How many models there is time to test: with more, less is lost by the first that fails."""
    limits, promise = evaluator.limits, evaluator.promise
    samples = 0 if promise is None else promise.samples
    each = max(1, samples) * sample_seconds(evaluator.original)
    return max(limits.rungs, min(limits.rungs_joined, int(limits.testing_seconds / each)))


def thinned(milder: Sequence[T], most: int) -> list[T]:
    """At most so many of some models, given from mild to bold: the boldest first.

    Those after it are picked with ever larger steps, unless all of them are few enough.
    """
    if len(milder) <= most:
        return list(reversed(milder))
    steps = [1 + i * (i + 1) // 2 for i in range(most)]
    picked = [milder[-step] for step in steps if step <= len(milder)]
    if len(picked) < most and picked[-1] is not milder[0]:
        picked.append(milder[0])
    return picked


def _paying(evaluator: Evaluator, proposal: Proposal) -> tuple[Rung | None, Proposal]:
    """The proposed set without the layers with which it doesn't pay, and the reasons for those."""
    chosen, evaluation = proposal.chosen, proposal.evaluation
    while chosen:
        try:
            evaluation = evaluation or evaluator.improved(choices_of(chosen))
            why = _why_not_paying(evaluator, chosen, evaluation)
        except ModelError as error:
            why = str(error)
        else:
            if why is None:
                return Rung(chosen, evaluation, proposal), proposal
        items = chosen
        ranked = sorted(items, key=lambda name: proposal.worth(name, items[name]))
        half = len(ranked) // 2
        put_back = put_back_reasons(ranked[half:], why)
        proposal = replace(proposal, reasons={**proposal.reasons, **put_back})
        chosen, evaluation = {name: items[name] for name in ranked[:half]}, None
    return None, proposal


def _why_not_paying(evaluator: Evaluator, chosen: Chosen, evaluation: Evaluation) -> str | None:
    """Why a set is put back: its file is too large, loses too much, or isn't faster.

    Raises
    ------
    BudgetError
        If a budget was asked for, and the file is too large or loses too much.
    """
    why = evaluator.verdicts.too_large(evaluation.nbytes)
    why = why or evaluator.verdicts.why_ruled_out(evaluation.quality)
    if why is not None and evaluator.options.fraction is not None:
        raise BudgetError(f"the budget can't be met: {why}")
    if why is None and evaluator.timed and evaluator.options.latency_vetoes:
        with evaluator.progress.stage(f"time {len(chosen)} replaced layers", None):
            why = why_too_slow(evaluator, chosen, evaluator.compare(evaluation.variant))
    return why


def why_too_slow(evaluator: Evaluator, chosen: Chosen, speed: Comparison) -> str | None:
    """Why latency vetoes a set, if it may."""
    # What only makes the file smaller has to be no slower, the rest has to be faster.
    stored = any(c.choice.graph_pass.at_load for c in chosen.values())
    enough = ("faster", "within noise") if stored else ("faster",)
    if not evaluator.options.latency_vetoes or speed.verdict in enough:
        return None
    return (
        f"the whole model is {'slower' if stored else 'not measurably faster'} with it "
        f"({speed.speedup:.2f}×, 95% {speed.low:.2f} to {speed.high:.2f})"
        f"{speed.doubt}"
    )


def _rung(evaluator: Evaluator, proposal: Proposal, chosen: Chosen, sequential: int) -> Rung | None:
    """A model of the ladder; None where there is none, or its file is too large."""
    try:
        with evaluator.progress.stage(f"build a model of {len(chosen)} replaced layers", None):
            evaluation = evaluator.evaluate(evaluator.variant(choices_of(chosen), sequential))
    except ModelError:
        return None
    if evaluator.verdicts.too_large(evaluation.nbytes):
        return None
    return Rung(chosen, evaluation, proposal)


def _distinct(sets: Sequence[Chosen], *others: Chosen) -> list[Chosen]:
    """Those that are not empty, and no repetition of one before."""
    before, rest = [choices_of(other) for other in others], []
    for chosen in sets:
        choices = choices_of(chosen)
        if choices and choices not in before:
            before.append(choices)
            rest.append(chosen)
    return rest
