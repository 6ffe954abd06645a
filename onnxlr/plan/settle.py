"""The ladder of models tested from the mild end on, and the last that holds what was promised."""

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from onnxlr.errors import BudgetError, ModelError
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.ladder import Ladder, Rung, why_too_slow
from onnxlr.plan.plan import Alternative
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.search import Chosen, choices_of
from onnxlr.plan.verdicts import Verdicts, put_back_reasons
from onnxlr.prepare.samples import Samples
from onnxlr.rewrite.variant import Variant
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency import Comparison
from onnxlr.verify.layer_latency import LayerTime
from onnxlr.verify.layers_alone import check_layers, worst

_CHECKED_FEEDS = 4  # that layers are compared alone on
# Models of one course that aren't faster, after which its milder ones aren't timed: they save less.
_MOST_SLOW = 2


@dataclass(frozen=True)
class Refused:
    """The first model that didn't hold what was promised: what it lost on the test samples."""

    rung: Rung
    quality: Quality
    why: str


@dataclass(frozen=True)
class Selection:
    """The model that is handed over, its quality and speed, and why the other layers stay.

    Attributes
    ----------
    chosen : dict of str to Candidate
        By layer name.
    reasons : mapping of str to str
        Why a layer that isn't chosen stays as it is.
    variant : Variant
        The chosen set with its factors.
    quality : Quality or None
        Measured on the saved file, on the test samples, or layer by layer; None where nothing
        was judged.
    speed : Comparison or None
        The original and the saved file in turn; None where nothing was timed.
    alternatives : mapping of str to tuple of Alternative
        By layer name, all that was weighed.
    times : mapping of str to LayerTime
        Of the chosen replacements that were timed, each alone.
    more_ms : mapping of str to float
        Milliseconds that they take more within the model, where that was measured.
    verdicts : Verdicts
        By which it was selected, with the promise that holds.
    refused : Refused or None
        The next bolder model, if it was tested and not handed over.
    """

    chosen: Chosen
    reasons: Mapping[str, str]
    variant: Variant
    quality: Quality | None
    speed: Comparison | None
    alternatives: Mapping[str, tuple[Alternative, ...]]
    times: Mapping[str, LayerTime]
    more_ms: Mapping[str, float]
    verdicts: Verdicts
    refused: Refused | None = None


def settle(evaluator: Evaluator, ladder: Ladder, examiner: Judge | None) -> Selection:
    """The boldest model of a ladder that holds what was promised, or the original.

    Models are tested from the mild end on, and the first that fails ends it (fixed-sequence
    testing: Angelopoulos et al. 2021, arXiv 2110.01052): so the confidence is the promised one for
    all of them together. Of those that hold it, the boldest that is faster is handed over. Where
    few samples show the highest confidence that they can of none that is, means are compared.

    Parameters
    ----------
    evaluator : Evaluator
        Of the original.
    ladder : Ladder
        Made without the test samples.
    examiner : Judge or None
        Of the test samples; None where there are none, so that those that choose decide.

    Raises
    ------
    BudgetError
        If a budget was asked for, and what meets it doesn't hold the promise.
    """
    proposal = ladder.proposal
    if evaluator.options.verify == "layers":
        return _settle_alone(evaluator, proposal)
    judge = evaluator.judge
    if judge is None or evaluator.rival is None:
        return _selection(evaluator, proposal, proposal.chosen, None, None)
    qualities = _Qualities(evaluator, examiner)
    attempt = _attempt(evaluator, ladder, evaluator.verdicts, qualities)
    comparing = evaluator.verdicts.comparing
    if attempt.best is None and attempt.refused is not None and comparing is not None:
        other = _attempt(evaluator, ladder, comparing, qualities)
        reasons = {**attempt.reasons, **other.reasons}
        attempt = replace(attempt, reasons=reasons) if other.best is None else other
    refused, reasons, best = attempt.refused, attempt.reasons, attempt.best
    if refused is not None and evaluator.options.fraction is not None:
        raise BudgetError(f"the budget can't be met: {refused.why}")
    if best is not None:
        return _selection(
            *(evaluator, best.rung.proposal, best.rung.chosen, best.quality, best.speed),
            *(reasons, best.rung.variant, refused, attempt.verdicts),
        )
    with evaluator.progress.stage("verify", None):
        last = examiner or judge
        unchanged = last.original if evaluator.finish is None else evaluator.rival
        quality = last.judge(unchanged)
        empty = Variant({}, {})
        speed = evaluator.compare(empty) if evaluator.timed else None
    return _selection(evaluator, proposal, {}, quality, speed, reasons, empty, refused)


@dataclass(frozen=True)
class _Held:
    """A model that holds the promise, on the test samples, and how it compared in time."""

    rung: Rung
    quality: Quality
    speed: Comparison | None


@dataclass(frozen=True)
class _Attempt:
    """The result of testing a ladder.

    Attributes
    ----------
    verdicts : Verdicts
        By which it was tested.
    best : _Held or None
        The boldest of those that hold the promise and are faster.
    refused : Refused or None
        The first model that doesn't hold it.
    reasons : dict of str to str
        Why layers of that model, and of those that aren't faster, are put back.
    """

    verdicts: Verdicts
    best: _Held | None
    refused: Refused | None
    reasons: dict[str, str]


def _attempt(
    evaluator: Evaluator, ladder: Ladder, verdicts: Verdicts, qualities: "_Qualities"
) -> _Attempt:
    """Test a ladder, and time what holds the promise, from the bold end on."""
    holding, refused = _tested(evaluator, ladder, verdicts, qualities)
    reasons: dict[str, str] = {}
    if refused is not None:
        reasons |= put_back_reasons(refused.rung.chosen, refused.why)
    slow: Counter[object] = Counter()
    for rung, quality in reversed(holding):
        course = rung.variant.narrowing
        if slow[course] >= _MOST_SLOW:
            continue
        speed, why = None, None
        if evaluator.timed:
            with evaluator.progress.stage(f"time {len(rung.chosen)} replaced layers", None):
                speed = evaluator.compare(rung.variant)
            why = why_too_slow(evaluator, rung.chosen, speed)
        if why is None:
            best = _Held(rung, quality, speed)
            return _Attempt(verdicts, best, refused, reasons)
        slow[course] += 1
        reasons |= put_back_reasons(rung.chosen, why)
    return _Attempt(verdicts, None, refused, reasons)


@dataclass(frozen=True)
class _Qualities:
    """Models of a ladder on the test samples, each run on them once."""

    evaluator: Evaluator
    examiner: Judge | None
    _known: dict[Hashable, Quality] = field(default_factory=dict)

    def of(self, rung: Rung) -> Quality:
        """The quality of a model; that on the samples that choose, where no others test.

        Raises
        ------
        ModelError
            If it fails on them.
        """
        if self.examiner is None:
            return rung.quality
        key = rung.variant.key
        if key not in self._known:
            built = self.evaluator.builder.build(rung.variant)
            session = self.evaluator.open(built, self.examiner.machine)
            self._known[key] = self.examiner.judge(session, key).beside(rung.quality)
        return self._known[key]


def _tested(
    evaluator: Evaluator, ladder: Ladder, verdicts: Verdicts, qualities: _Qualities
) -> tuple[list[tuple[Rung, Quality]], Refused | None]:
    """The models that hold the promise, from the mild end on, and the first that doesn't."""
    holding: list[tuple[Rung, Quality]] = []
    with evaluator.progress.stage("test", len(ladder.rungs)) as step:
        for rung in ladder.rungs:
            step(f"{len(rung.chosen)} replaced layers")
            try:
                quality = qualities.of(rung)
            except ModelError as error:
                return holding, Refused(rung, rung.quality, str(error))
            why = verdicts.why_outside_limit(quality) or verdicts.why_not_shown(quality)
            if why is not None:
                return holding, Refused(rung, quality, why)
            holding.append((rung, quality))
    return holding, None


def _settle_alone(evaluator: Evaluator, proposal: Proposal) -> Selection:
    """Put back every layer that alone is outside the limit."""
    feeding, feeds = evaluator.feeding, []
    if feeding is not None and isinstance(feeding.judging, Samples):
        samples = feeding.judging.take(_CHECKED_FEEDS * feeding.judging.batch)
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
        if (why := evaluator.verdicts.why_outside_limit(quality)) is None:
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
    refused: Refused | None = None,
    verdicts: Verdicts | None = None,
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
        proposal.more_ms,
        verdicts or evaluator.verdicts,
        refused,
    )
