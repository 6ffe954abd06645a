"""Courses of a search: chains on the original, fewer channels, chains on what has fewer channels.

One limit holds for all of them, the judge of the original judges them all, and their models make
one ladder: what is tested doesn't depend on where it comes from. Within a budget it is what loses
least.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxlr.courses.beginning import Base, share_left
from onnxlr.courses.narrow import NarrowModel, NarrowPath
from onnxlr.errors import BudgetError
from onnxlr.layers.macs import count_macs
from onnxlr.methods.channels import INTERPOLATIVE
from onnxlr.plan.budget import saved_macs
from onnxlr.plan.choose import propose
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.frontier import original_ms, time_left
from onnxlr.plan.in_place import is_timed_in_place
from onnxlr.plan.ladder import (
    Ladder,
    Rung,
    begin_ladder,
    most_rungs,
    thinned,
    why_too_slow,
    with_others,
)
from onnxlr.plan.proposal import Proposal
from onnxlr.verify.latency_table import LatencyTable
from onnxlr.widths.find import Widths
from onnxlr.widths.narrowing import Narrowing

_ROOM = 0.35  # of the boldest model's loss: what a model has lost that chains are looked for on
# Of what the best course saves within the limit: one that saves less is no better where less is
# lost, and building its milder models would take as long as building those that are tested.
_BEHIND = 0.8
# Loss by the relative error of the outputs, at least: where nothing is lost on these samples, what
# is closer to the original is the milder all the same, by however little it is.
_LEAST_SLOPE, _TIE = 1e-3, 1e-6


@dataclass(frozen=True, eq=False)
class Courses:
    """Finished searches, and the ladder of models to test.

    Attributes
    ----------
    bases : mapping of Narrowing or None to Base
        The models that chains were looked for on, the original as None.
    proposals : mapping of Narrowing or None to Proposal
        What was learned on each of them.
    ladder : Ladder
        Models of all courses.
    """

    bases: Mapping[Narrowing | None, Base]
    proposals: Mapping[Narrowing | None, Proposal]
    ladder: Ladder


Begin = Callable[[Narrowing], Base]


def follow(original: Base, path: NarrowPath, begin: Begin, table: LatencyTable | None) -> Courses:
    """Follow every course: chains, fewer channels, and both.

    Parameters
    ----------
    original : Base
    path : NarrowPath
        Acceptable models with fewer channels.
    begin : callable
        Gives the base of a model with fewer channels.
    table : LatencyTable or None

    Raises
    ------
    BudgetError
        If a fraction of the original can't be reached within the limit on any course.
    """
    evaluator = original.evaluator
    bases: dict[Narrowing | None, Base] = {None: original}
    proposals: dict[Narrowing | None, Proposal] = {None: Proposal({}, {})}
    begun: list[tuple[Evaluator, Ladder]] = []
    failed: BudgetError | None = None
    for base in (original, *_bases(evaluator, path, begin)):
        narrowing = base.evaluator.narrowing
        bases[narrowing] = base
        try:
            proposal = propose(base.evaluator, base.fits, table, proposals[None])
            ladder = begin_ladder(base.evaluator, proposal)
            begun.append((base.evaluator, ladder))
            proposals[narrowing] = ladder.proposal
        except BudgetError as error:
            failed = failed or error
    ladders = _completed(evaluator, begun)
    narrow = _narrow_alone if evaluator.options.fraction is None else _narrow_within
    # Where no chains were asked for, what no method fits says nothing of the layer.
    unfit = original.fits.reasons if any(original.fits.by_layer.values()) else {}
    if rungs := narrow(evaluator, path, unfit):
        ladders.append(Ladder(proposals[None], rungs))
    if not ladders:
        assert failed is not None
        raise failed
    return Courses(bases, proposals, _joined(evaluator, ladders))


def stay(original: Base, widths: Widths, why: str) -> tuple[NarrowPath, Courses]:
    """No course at all, and the reason for every layer and width.

    Raises
    ------
    BudgetError
        If a fraction of the original was asked for.
    """
    evaluator = original.evaluator
    if evaluator.options.fraction is not None:
        raise BudgetError(f"the budget can't be met: {why}")
    proposal = Proposal({}, {layer.name: why for layer in evaluator.prepared.layers})
    path = NarrowPath(reasons={width.name: width.refusal or why for width in widths.rows})
    return path, Courses({None: original}, {None: proposal}, Ladder(proposal))


def _bases(evaluator: Evaluator, path: NarrowPath, begin: Begin) -> Sequence[Base]:
    """Models with fewer channels that leave room for chains."""
    models = [m for m in path.models if m.level is not None]
    if not models or not evaluator.time.allows(0.45, "chains on fewer channels"):
        return ()
    last = models[-1].level
    assert last is not None
    if evaluator.options.fraction is not None:
        roomy = [
            m for m in models if share_left(evaluator, m.narrowing) > evaluator.options.fraction
        ]
        return (begin(roomy[-1].narrowing),) if roomy else ()
    roomy = [m for m in models if m.level is not None and m.level.loss <= _ROOM * last.loss]
    return (begin((roomy or models)[-1].narrowing),)


def _completed(evaluator: Evaluator, begun: Sequence[tuple[Evaluator, Ladder]]) -> list[Ladder]:
    """Ladders with milder and bolder models, of courses that save nearly as much as the best."""
    saved = [0.0] * len(begun)
    if sum(bool(ladder.rungs) for _, ladder in begun) > 1:
        rungs = [ladder.rungs for _, ladder in begun]
        saved = [1 - _costs(evaluator, models)[-1][0] if models else 0.0 for models in rungs]
    promise = evaluator.promise
    # With few samples the boldest mostly fail, and what is handed over is a milder model.
    least = 0.0 if promise is not None and promise.lowered else _BEHIND * max(saved, default=0.0)
    return [
        with_others(searched, ladder) if share >= least else ladder
        for share, (searched, ladder) in zip(saved, begun, strict=True)
    ]


def _narrow_alone(
    evaluator: Evaluator, path: NarrowPath, unfit: Mapping[str, str]
) -> tuple[Rung, ...]:
    """Fewer channels and no chains, as far as that is faster."""
    rungs = _rungs(evaluator, path.models, "are faster than chains", unfit)
    if rungs and evaluator.timed and evaluator.options.latency_vetoes:
        with evaluator.progress.stage("time fewer channels", None):
            speed = evaluator.compare(rungs[-1].variant)
        if why_too_slow(evaluator, {}, speed) is not None:
            return ()
    return rungs


def _narrow_within(
    evaluator: Evaluator, path: NarrowPath, unfit: Mapping[str, str]
) -> tuple[Rung, ...]:
    """Fewer channels and no chains, where that alone meets a budget."""
    fraction = evaluator.options.fraction
    assert fraction is not None
    meeting = [m for m in path.models if share_left(evaluator, m.narrowing) <= fraction]
    return _rungs(evaluator, meeting, "lose less than chains", unfit)[:1]


def _rungs(
    evaluator: Evaluator, models: Sequence[NarrowModel], why: str, unfit: Mapping[str, str]
) -> tuple[Rung, ...]:
    """Models with fewer channels as rungs; what no method fits stays for that reason."""
    rungs = []
    chains = any(method != INTERPOLATIVE.name for method in evaluator.options.methods)
    for model in models:
        left = {layer.name: layer.shape for layer in model.narrowing.prepared.layers}
        reasons = {}
        for layer in evaluator.prepared.layers:
            same = left.get(layer.name) == layer.shape
            place = "elsewhere" if same else "around it"
            words = f"fewer channels {place} {why if chains else 'are all that was asked for'}"
            reasons[layer.name] = unfit.get(layer.name, words) if same else words
        rungs.append(Rung({}, model.evaluation, Proposal({}, reasons)))
    return tuple(rungs)


def _joined(evaluator: Evaluator, ladders: Sequence[Ladder]) -> Ladder:
    """One ladder of the models of several, on which each is bolder and cheaper than the last.

    A model that costs as much as a milder one, or more, is left out.
    """
    standing = [ladder for ladder in ladders if ladder.rungs] or ladders[:1]
    if len(standing) == 1:
        return Ladder(ladders[0].proposal, standing[0].rungs)
    if evaluator.options.fraction is not None:
        damage = evaluator.verdicts.damage
        return min(standing, key=lambda ladder: damage(ladder.rungs[-1].quality))
    rungs = [rung for ladder in standing for rung in ladder.rungs]
    costs = [cost for ladder in standing for cost in _costs(evaluator, ladder.rungs)]
    rows = list(zip(_risks(evaluator, rungs), costs, rungs, strict=True))
    front: list[Rung] = []
    least: tuple[float, int] | None = None
    for _, cost, rung in sorted(rows, key=lambda row: row[:2]):
        if least is None or cost < least:
            least = cost
            front.append(rung)
    milder = thinned(front[:-1], most_rungs(evaluator) - 1)
    return Ladder(ladders[0].proposal, (*reversed(milder), front[-1]))


def _risks(evaluator: Evaluator, rungs: Sequence[Rung]) -> list[float]:
    """A measure, from these samples, of how much models will lose on other samples.

    Where classes are judged, it is how far their probabilities moved: on few samples the share of
    right ones moves in steps and by luck, and of many models the luckiest would seem the mildest.
    Elsewhere it is the loss on these samples, drawn to what models as far from the original lose,
    the more so the less sure it is (Efron & Morris 1973, JASA 68:117). A gain is taken for luck:
    else what is farthest from the original would be thought the best where a few samples gain.
    """
    qualities = [rung.quality for rung in rungs]
    divergences = [q.fidelity.divergence for q in qualities]
    if evaluator.verdicts.by_classes:
        known = [d for d in divergences if d is not None]
        if len(known) == len(rungs):
            return known
    apart = np.array([q.fidelity.rel_error for q in qualities])
    drops = np.array([max(q.drop, 0.0) for q in qualities])
    if not all(q.losses for q in qualities):
        return [float(risk) for risk in drops + apart]
    noise = np.array([max(item.noise for item in q.losses) for q in qualities]) ** 2
    slope = float(apart @ drops) / max(float(apart @ apart), 1e-300)
    usual = apart * max(slope, _LEAST_SLOPE)
    spread = max(float(np.mean((drops - usual) ** 2 - noise)), 0.0)
    drawn = noise / np.maximum(noise + spread, 1e-300)
    return [float(risk) for risk in drops + drawn * (usual - drops) + _TIE * apart]


def _costs(evaluator: Evaluator, rungs: Sequence[Rung]) -> list[tuple[float, int]]:
    """What the models of one course cost as a share of the original, and their bytes.

    They are milliseconds where those decide. A model isn't timed for that if a bolder one was: its
    layers' times mislead where the runtime fuses, by as much as those of the bolder one. Elsewhere
    they are multiply-accumulates; also where a latency table is named, since the same table has to
    give the same plan.
    """
    if is_timed_in_place(evaluator):
        left = _time_left(evaluator, rungs)
    else:
        prepared = evaluator.original
        whole = max(1, count_macs(prepared.model, prepared.shapes))
        left = [_macs_left(evaluator, rung) / whole for rung in rungs]
    sizes = [rung.evaluation.nbytes for rung in rungs]
    return list(zip(left, sizes, strict=True))


def _time_left(evaluator: Evaluator, rungs: Sequence[Rung]) -> list[float]:
    timed = [rung for rung in rungs if evaluator.speed_of(rung.variant) is not None]
    reference = (timed or rungs)[-1]
    speed = evaluator.compare(reference.variant)
    total = original_ms(evaluator, reference.proposal, speed)
    assert total is not None
    return time_left(evaluator, reference.proposal, [rung.variant for rung in rungs], total)


def _macs_left(evaluator: Evaluator, rung: Rung) -> int:
    """Multiply-accumulates of a model."""
    narrowing = rung.variant.narrowing
    prepared = evaluator.original if narrowing is None else narrowing.prepared
    return count_macs(prepared.model, prepared.shapes) - saved_macs(prepared, rung.chosen)
