"""Models with fewer channels, from mild to bold: widths weighed, narrowed, judged and corrected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxlr.calibrate.budget import calibration_samples, correcting_seconds
from onnxlr.courses.channels import (
    Costs,
    Counts,
    Level,
    WidthOffer,
    kept_of,
    named_counts,
    path,
    thinned,
)
from onnxlr.courses.weigh import offers_of
from onnxlr.errors import ModelError
from onnxlr.layers.macs import count_macs
from onnxlr.model.constants import count_params
from onnxlr.plan.choose import LOSSES
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.judged import Evaluation
from onnxlr.plan.width_plan import WidthPlan, width_decision
from onnxlr.rewrite.variant import Variant
from onnxlr.widths.find import Widths
from onnxlr.widths.narrow import Kept
from onnxlr.widths.narrowing import Narrower, Narrowing

_EXACT = 1e-2  # of outputs, beyond which what fitted the samples doesn't hold for others
_PARTS = (0.5, 1.0)  # of what a budget asks for, that fewer channels save


@dataclass(frozen=True, eq=False)
class NarrowModel:
    """A model with fewer channels, and its quality on the samples that choose."""

    narrowing: Narrowing
    evaluation: Evaluation
    level: Level | None = None


@dataclass(frozen=True, eq=False)
class NarrowPath:
    """Models with fewer channels that are acceptable, from mild to bold.

    Attributes
    ----------
    models : tuple of NarrowModel
    offers : tuple of WidthOffer
    reasons : mapping of str to str
        Why widths stay as they are, by name, as far as that is known.
    costs : Costs or None
    """

    models: tuple[NarrowModel, ...] = ()
    offers: tuple[WidthOffer, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    costs: Costs | None = None


def narrow_path(evaluator: Evaluator, narrower: Narrower) -> NarrowPath:
    """A short path of models with fewer channels, judged on the samples that choose.

    Parameters
    ----------
    evaluator : Evaluator
        Of the original.
    narrower : Narrower
    """
    offers = offers_of(evaluator, narrower)
    rule, goal = evaluator.options.rank, evaluator.options.goal
    reasons = {row.name: row.refusal for row in narrower.widths.rows if row.refusal}
    if not offers:
        return NarrowPath((), (), reasons)
    costs = Costs(evaluator.original.layers, narrower.widths, goal)
    if rule.kind != "auto":
        exact = rule.kind == "exact"
        counts, kept_whole = named_counts(offers, rule)
        models, why = _as_named(evaluator, narrower, offers, counts, exact=exact)
        reasons |= kept_whole | ({} if models else dict.fromkeys(counts, why))
        return NarrowPath(models, tuple(offers), reasons, costs)
    levels = path(offers, costs, gridded=goal == "latency")
    if evaluator.options.fraction is None:
        models = _searched(evaluator, narrower, offers, thinned(levels, LOSSES))
    else:
        needed = (1 - evaluator.options.fraction) * _total(evaluator, costs)
        models = _saving(evaluator, narrower, offers, levels, costs.total - needed)
    boldest = models[-1].narrowing.kept if models else {}
    for offer in offers:
        if offer.width.name not in boldest:
            reasons[offer.width.name] = _why_whole(offer)
    return NarrowPath(models, tuple(offers), reasons, costs)


def _total(evaluator: Evaluator, costs: Costs) -> float:
    """What the original costs as a whole, in the unit of the costs."""
    goal, prepared = evaluator.options.goal, evaluator.original
    if goal == "macs":
        return count_macs(prepared.model, prepared.shapes)
    return costs.total if goal == "latency" else count_params(prepared.source.model)


def _saving(
    evaluator: Evaluator,
    narrower: Narrower,
    offers: Sequence[WidthOffer],
    levels: Sequence[Level],
    most: float,
) -> tuple[NarrowModel, ...]:
    """Models whose fewer channels save a part of what a budget asks for, and all of it."""
    total = max((level.cost for level in levels), default=0.0)
    found = []
    with evaluator.progress.stage("narrow and verify", len(_PARTS)) as step:
        for part in _PARTS:
            costly = total + part * (most - total)
            level = next((v for v in levels if v.cost <= costly), None)
            if level is not None and evaluator.time.allows(0.4, "fewer channels within a budget"):
                found.append(_better(evaluator, narrower, kept_of(offers, level.counts), level))
            step(f"{part:.0%} of what is to be saved")
    return tuple(model for model in found if model is not None)


def _better(
    evaluator: Evaluator, narrower: Narrower, kept: Kept, level: Level
) -> NarrowModel | None:
    """The closer of two models: as fitted, or corrected in sequence."""
    plain, _ = _judged(evaluator, narrower.narrow(kept), level)
    if not evaluator.correction_samples:
        return plain
    corrected, _ = _corrected(evaluator, narrower, kept, level)
    if corrected is None or plain is None:
        return corrected or plain
    return corrected if _closer(corrected, plain) else plain


def _why_whole(offer: WidthOffer) -> str:
    count = max(1, offer.width.size // 2)
    harm = offer.sensitivity.harm(offer.error(count))
    return (
        "other widths save more for less loss: half of its channels would leave a rel. error of "
        f"{harm:.3g}"
    )


def _as_named(
    evaluator: Evaluator,
    narrower: Narrower,
    offers: Sequence[WidthOffer],
    counts: Counts,
    *,
    exact: bool,
) -> tuple[tuple[NarrowModel, ...], str]:
    """The model with the named numbers of channels, or why it isn't acceptable."""
    if not counts:
        return (), ""
    narrowing = narrower.narrow(kept_of(offers, counts))
    model, why = _judged(evaluator, narrowing, None)
    if exact and model is not None:
        reached = model.evaluation.quality.fidelity.rel_error
        if reached > _EXACT:
            why = f"on other samples it isn't exact: rel. error {reached:.2g}"
            return (), f"put back: {why}"
    models = [] if model is None else [model]
    samples = evaluator.correction_samples
    if not exact and samples:
        corrected, other = _corrected(evaluator, narrower, narrowing.kept, None)
        if corrected is not None and (why is not None or _closer(corrected, models[0])):
            models, why = [corrected], None
        why = why and (other or why)
    return tuple(models), f"put back: {why}"


def _closer(one: NarrowModel, other: NarrowModel) -> bool:
    a, b = one.evaluation.quality.fidelity, other.evaluation.quality.fidelity
    return a.rel_error < b.rel_error


def _judged(
    evaluator: Evaluator, narrowing: Narrowing, level: Level | None
) -> tuple[NarrowModel | None, str | None]:
    """A model that the samples that choose accept, or why they don't."""
    try:
        evaluation = evaluator.evaluate(Variant({}, {}, 0, narrowing))
    except ModelError as error:
        return None, str(error)
    why = evaluator.verdicts.too_large(evaluation.nbytes)
    why = why or evaluator.verdicts.why_unlikely(evaluation.quality)
    return (None, why) if why else (NarrowModel(narrowing, evaluation, level), None)


def _corrected(
    evaluator: Evaluator, narrower: Narrower, kept: Kept, level: Level | None
) -> tuple[NarrowModel | None, str | None]:
    """The same with readers corrected in sequence."""
    assert evaluator.feeding is not None
    assert evaluator.feeding.fit is not None
    fitted = calibration_samples(evaluator.original, evaluator.feeding.fit, evaluator.limits)
    samples = fitted.take(_samples(evaluator))
    try:
        narrowing = narrower.corrected(kept, samples, evaluator.options.seed, evaluator.progress)
    except ModelError as error:
        return None, str(error)
    return _judged(evaluator, narrowing, level)


def _samples(evaluator: Evaluator) -> int:
    """How many samples there is time for in one correction."""
    limits, each = evaluator.limits, correcting_seconds(evaluator.original)
    seconds = limits.sequence_seconds / (limits.narrow_corrections + 1)
    affordable = max(limits.sequence_samples_least, int(seconds / each))
    return min(evaluator.correction_samples, affordable)


def _searched(
    evaluator: Evaluator,
    narrower: Narrower,
    offers: Sequence[WidthOffer],
    levels: Sequence[Level],
) -> tuple[NarrowModel, ...]:
    """Acceptable models from mild to bold, the boldest corrected in sequence if that helps."""
    found: dict[int, NarrowModel] = {}
    low, high, trials = -1, len(levels), 0
    limits, time = evaluator.limits, evaluator.time
    with evaluator.progress.stage("narrow and verify", None) as step:
        while high - low > 1 and trials < limits.narrow_trials:
            if not time.allows(0.3, "further trials of widths"):
                break
            middle, trials = (low + high) // 2, trials + 1
            step(f"trial of {len(levels[middle].counts)} widths")
            kept = kept_of(offers, levels[middle].counts)
            model, _ = _judged(evaluator, narrower.narrow(kept), levels[middle])
            if model is None:
                high = middle
            else:
                low, found[middle] = middle, model
    corrections = 0
    at = max(low, 0)
    while at < len(levels) and corrections < limits.narrow_corrections:
        if not evaluator.correction_samples or not time.allows(0.4, "correction of widths"):
            break
        corrections += 1
        kept = kept_of(offers, levels[at].counts)
        model, _ = _corrected(evaluator, narrower, kept, levels[at])
        if model is None:
            break
        if at not in found or _closer(model, found[at]):
            found[at] = model
        at += 1
    return tuple(found[i] for i in sorted(found))


def planned_widths(
    widths: Widths, path: NarrowPath, narrowing: Narrowing | None, layers: Sequence[str]
) -> WidthPlan:
    """The decisions for widths where this is handed over.

    Parameters
    ----------
    widths : Widths
    path : NarrowPath
    narrowing : Narrowing or None
        None where no width is narrowed.
    layers : sequence of str
        Those whose inputs were looked at.
    """
    kept = {} if narrowing is None else narrowing.kept
    offers = {offer.width.name: offer for offer in path.offers}
    rows = []
    for width in widths.rows:
        stays, offer = kept.get(width.name), offers.get(width.name)
        if stays is None:
            why = width.refusal or path.reasons.get(width.name)
            why = why or (
                "not narrowed in the model that is handed over" if path.models else "put back"
            )
            rows.append(width_decision(width, None, why))
            continue
        error = None if offer is None else offer.error(len(stays))
        words = f"{len(stays)} of {width.size} channels stay"
        if width.heads > 1:
            words += f", {len(stays) // width.heads} of each of {width.heads} heads"
        rows.append(width_decision(width, stays, words, error))
    if narrowing is None:
        return WidthPlan(tuple(rows))
    inputs = narrowing.origin.input_shapes
    return WidthPlan(tuple(rows), narrowing.sequential, tuple(layers), inputs)
