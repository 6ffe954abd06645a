"""What replacements save within the model, measured where a sum over layers misleads.

A layer that is timed alone may be fused with its neighbours in the model, or be given its input in
another layout: then what it saves there is something else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxlr.errors import ModelError
from onnxlr.methods.choice import Choice
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.search import Chosen, choices_of
from onnxlr.plan.tradeoff import Tradeoff
from onnxlr.rewrite.variant import Variant
from onnxlr.system.session import Session
from onnxlr.verify.latency import times_in_turn

_DIFFERENCE = 0.1  # between predicted and measured time, from which on layers are timed in place
_AT_ONCE = 8  # models beside the candidate that are timed in turn
_OPEN_BYTES = 2 << 30  # that those take together, at most


@dataclass(frozen=True)
class InPlace:
    """What replacements were seen to save within a model.

    Attributes
    ----------
    predicted_ms, measured_ms : float
        Of the candidate as a whole, by its layers and in fact.
    saved_ms : mapping of str to float
        By layer name: the milliseconds of the candidate without that replacement, less those with
        it.
    """

    predicted_ms: float
    measured_ms: float
    saved_ms: Mapping[str, float]


def is_timed_in_place(evaluator: Evaluator) -> bool:
    """Whether whole models are timed before the choice is made.

    With a named latency table they aren't: the same table has to give the same plan.
    """
    options = evaluator.options
    return evaluator.timed and options.latency_vetoes and options.latency_table is None


def time_in_place(evaluator: Evaluator, tradeoff: Tradeoff, chosen: Chosen) -> InPlace | None:
    """What each replacement of a set saves in the model; None where the prediction is right.

    Where the provider compiles the model, a sum of layers that is right shows nothing.

    Parameters
    ----------
    evaluator : Evaluator
    tradeoff : Tradeoff
        Costs in milliseconds.
    chosen : dict of str to Candidate
    """
    variant = evaluator.factorizer.variant(choices_of(chosen))
    base = Variant({}, {}, 0, evaluator.narrowing)
    try:
        with evaluator.progress.stage(f"time {len(chosen)} replaced layers", None):
            whole, seconds = evaluator.open_variant(variant), evaluator.limits.in_place_seconds
            before, after = _in_turn(evaluator, (evaluator.open_variant(base), whole), seconds)
        predicted = before - tradeoff.saved(chosen)
        # A compiler fuses: what two layers lose and gain by it may cancel out in the sum.
        fused = evaluator.options.machine.compiles
        if not fused and abs(predicted - after) <= _DIFFERENCE * after:
            return None
        with evaluator.progress.stage("time layers within the model", len(chosen)) as step:
            saved: dict[str, float] = {}
            for names in _groups(list(chosen), evaluator.original.source.nbytes):
                saved |= _saved(evaluator, variant, whole, names)
                for name in names:
                    step(name)
    except ModelError:  # the trial of the whole says so
        return None
    return InPlace(predicted, after, saved)


def corrected(tradeoff: Tradeoff, found: InPlace, chosen: Chosen) -> Tradeoff:
    """The same costs, put right for layers that were timed in place.

    What a layer's replacement takes more than alone, others of its candidates take more as well: a
    fusion that is lost, a layout that is changed.
    """
    rows = {}
    for name, row in tradeoff.layers.items():
        item = chosen.get(name)
        if item is not None and name in found.saved_ms:
            row = row.costing_more(row.as_is - item.cost - found.saved_ms[name])
        rows[name] = row
    return replace(tradeoff, layers=rows)


def _groups(names: Sequence[str], nbytes: int) -> list[Sequence[str]]:
    size = max(1, min(_AT_ONCE, _OPEN_BYTES // max(1, nbytes)))
    return [names[i : i + size] for i in range(0, len(names), size)]


def _saved(
    evaluator: Evaluator, variant: Variant, whole: Session, names: Sequence[str]
) -> dict[str, float]:
    """Milliseconds that each of some replacements saves beside all the others."""
    seconds = evaluator.limits.in_place_seconds * len(names) / len(variant.choices)
    without = [evaluator.open_variant(_without(variant, name)) for name in names]
    least, *others = _in_turn(evaluator, (whole, *without), seconds)
    return {name: ms - least for name, ms in zip(names, others, strict=True)}


def _in_turn(evaluator: Evaluator, sessions: Sequence[Session], seconds: float) -> list[float]:
    """Milliseconds of some models, timed in turn."""
    assert evaluator.feeding is not None
    return times_in_turn(sessions, evaluator.feeding.first_feed, seconds)


def _without(variant: Variant, name: str) -> Variant:
    choices: dict[str, Choice] = {n: c for n, c in variant.choices.items() if n != name}
    factors = {n: f for n, f in variant.factors.items() if n != name}
    return replace(variant, choices=choices, factors=factors)
