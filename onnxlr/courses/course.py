"""Courses of a search: chains on the original, fewer channels, chains on what has fewer channels.

One limit holds for all of them, and the judge of the original judges them all. What is fastest, or
within a budget least damaging, is taken on to the test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from onnxlr.courses.beginning import Base, share_left
from onnxlr.courses.narrow import NarrowModel, NarrowPath
from onnxlr.errors import BudgetError
from onnxlr.layers.macs import count_macs
from onnxlr.plan.budget import saved_macs
from onnxlr.plan.choose import propose
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.ladder import Ladder, Rung, build_ladder, why_too_slow
from onnxlr.plan.proposal import Proposal
from onnxlr.verify.latency import Comparison
from onnxlr.verify.latency_table import LatencyTable
from onnxlr.widths.narrowing import Narrowing

_ROOM = 0.35  # of the boldest model's loss: what a model has lost that chains are looked for on


@dataclass(frozen=True, eq=False)
class Course:
    """A search that has come to its proposal, and the ladder of models to test.

    Attributes
    ----------
    base : Base
    proposal : Proposal
    ladder : Ladder
    proposals : mapping of Narrowing or None to Proposal
        What was learned on each model that chains were looked for on, on other courses too.
    """

    base: Base
    proposal: Proposal
    ladder: Ladder
    proposals: Mapping[Narrowing | None, Proposal] = field(default_factory=dict)

    @property
    def top(self) -> Rung | None:
        """What the search came to."""
        return self.ladder.rungs[-1] if self.ladder.rungs else None


Begin = Callable[[Narrowing], Base]


def best_course(
    original: Base, path: NarrowPath, begin: Begin, table: LatencyTable | None
) -> Course:
    """The course to test, among chains, fewer channels, and both.

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
    courses: list[Course] = []
    proposals: dict[Narrowing | None, Proposal] = {None: Proposal({}, {})}
    failed: BudgetError | None = None
    for base in (original, *_bases(original.evaluator, path, begin)):
        try:
            courses.append(_followed(base, path, table))
            proposals[base.evaluator.narrowing] = courses[-1].proposal
        except BudgetError as error:
            failed = failed or error
    if original.evaluator.options.fraction is None:
        courses += _narrow_alone(original, path)
    else:
        courses += _narrow_within(original, path)
    if not courses:
        assert failed is not None
        raise failed
    best = courses[0] if len(courses) == 1 else _best(courses)
    return replace(best, proposals=proposals)


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


def _followed(base: Base, path: NarrowPath, table: LatencyTable | None) -> Course:
    """The search for chains on a model, with milder models that have fewer channels below it."""
    evaluator = base.evaluator
    proposal = propose(evaluator, base.fits, table)
    ladder = build_ladder(evaluator, proposal)
    if evaluator.narrowing is not None and ladder.rungs:
        top = ladder.rungs[-1].quality.fidelity.rel_error
        milder = [_rung(m) for m in path.models if m.evaluation is not None and _error(m) < top]
        rungs = sorted((*milder, *ladder.rungs[:-1]), key=lambda r: r.quality.fidelity.rel_error)
        most = evaluator.limits.rungs - 1
        ladder = replace(ladder, rungs=(*rungs[-most:], ladder.rungs[-1]))
    return Course(base, proposal, ladder)


def _error(model: NarrowModel) -> float:
    assert model.evaluation is not None
    return model.evaluation.quality.fidelity.rel_error


def _rung(model: NarrowModel) -> Rung:
    assert model.evaluation is not None
    return Rung({}, model.variant, model.evaluation.quality)


def _narrow_alone(original: Base, path: NarrowPath) -> list[Course]:
    """Fewer channels and no chains, as far as that is faster."""
    evaluator = original.evaluator
    rungs = tuple(_rung(m) for m in path.models if m.evaluation is not None)
    while rungs and evaluator.timed and evaluator.options.latency_vetoes:
        with evaluator.progress.stage("time fewer channels", None):
            why = why_too_slow(evaluator, {}, evaluator.compare(rungs[-1].variant))
        if why is None:
            break
        rungs = ()
    if not rungs:
        return []
    reasons = {
        layer.name: "fewer channels around it are faster than chains"
        for layer in evaluator.prepared.layers
    }
    return [Course(original, Proposal({}, reasons), Ladder(rungs))]


def _narrow_within(original: Base, path: NarrowPath) -> list[Course]:
    """Fewer channels and no chains, where that alone meets a budget."""
    evaluator = original.evaluator
    fraction = evaluator.options.fraction
    assert fraction is not None
    meeting = [
        m
        for m in path.models
        if m.evaluation is not None and share_left(evaluator, m.narrowing) <= fraction
    ]
    if not meeting:
        return []
    reasons = {
        layer.name: "fewer channels around it lose less than chains"
        for layer in evaluator.prepared.layers
    }
    rungs = tuple(_rung(m) for m in meeting[:1])
    return [Course(original, Proposal({}, reasons), Ladder(rungs))]


def _best(courses: Sequence[Course]) -> Course:
    """The course whose top is fastest, or within a budget loses least.

    Of those that can't be told apart by their times, it is the one with the fewest
    multiply-accumulates. So it is where a latency table is named, since what is timed anew would
    choose otherwise each time, and the same table has to give the same plan.
    """
    found = [course for course in courses if course.top is not None]
    if not found:
        return courses[0]
    evaluator = found[0].base.evaluator
    if evaluator.options.fraction is not None:
        return min(found, key=_damage)
    if evaluator.timed and evaluator.options.latency_table is None:
        speeds = [_speed(course) for course in found]
        least = max(speed.low for speed in speeds)
        pairs = zip(found, speeds, strict=True)
        found = [course for course, speed in pairs if speed.high >= least]
    return min(found, key=_macs_left)


def _damage(course: Course) -> float:
    """What the top of a course loses, by the metric and apart from it."""
    assert course.top is not None
    quality = course.top.quality
    by_classes = course.base.evaluator.verdicts.by_classes
    apart = quality.fidelity.divergence if by_classes else quality.fidelity.rel_error
    return quality.drop + (apart or 0.0)


def _speed(course: Course) -> Comparison:
    assert course.top is not None
    evaluator, variant = course.base.evaluator, course.top.variant
    return evaluator.speed_of(variant) or evaluator.compare(variant)


def _macs_left(course: Course) -> int:
    """Multiply-accumulates of the top of a course."""
    assert course.top is not None
    narrowing = course.top.variant.narrowing
    prepared = course.base.evaluator.original if narrowing is None else narrowing.prepared
    return count_macs(prepared.model, prepared.shapes) - saved_macs(prepared, course.top.chosen)
