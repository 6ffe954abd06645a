"""The set of replacements that was chosen, measured once more and put back until it pays."""

import itertools

from onnxlr.errors import BudgetError
from onnxlr.methods.base import WeightPass
from onnxlr.plan.choose import Choosing
from onnxlr.plan.evaluate import Assessor
from onnxlr.plan.search import Chosen, choices_of
from onnxlr.prepare.samples import Samples
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.latency import Comparison
from onnxlr.verify.layers_alone import check_layers, worst

_CHECKED_FEEDS = 4  # that layers are compared alone on


def settle(choosing: Choosing, chosen: Chosen) -> tuple[Chosen, Quality | None, Comparison | None]:
    """Measure the saved file once more; put back layers until it pays, or all of them."""
    assessor = choosing.assessor
    if assessor.options.verify == "layers":
        return _settle_alone(choosing, chosen)
    if assessor.judge is None or assessor.session is None:
        return chosen, None, None
    while chosen:
        quality = assessor.improved(choices_of(chosen))
        built = assessor.factory.build(choices_of(chosen))
        why = assessor.too_large(built) or assessor.over(quality)
        if why is not None and assessor.options.fraction is not None:
            raise BudgetError(f"the budget can't be met: {why}")
        speed = None
        if why is None and assessor.timed:
            with assessor.progress.stage(f"time {len(chosen)} replaced layers", None):
                speed = assessor.compare(built)
            why = _too_slow(assessor, chosen, speed)
        if why is None:
            return chosen, quality, speed
        ranked = sorted(chosen, key=lambda n: choosing.worth(n, chosen[n]))
        for name in ranked[len(ranked) // 2 :]:
            choosing.kept[name] = f"put back: {why}"
        chosen = {n: chosen[n] for n in ranked[: len(ranked) // 2]}
    with assessor.progress.stage("verify", None):
        quality = assessor.judge.judge(assessor.session)
        return {}, quality, assessor.compare(None) if assessor.timed else None


def _too_slow(assessor: Assessor, chosen: Chosen, speed: Comparison) -> str | None:
    """Why latency vetoes a set, if it may."""
    # What only makes the file smaller has to be no slower, the rest has to be faster.
    stored = any(isinstance(c.choice.graph_pass, WeightPass) for c in chosen.values())
    wanted = ("faster", "within noise") if stored else ("faster",)
    if not assessor.options.latency_vetoes or speed.verdict in wanted:
        return None
    return (
        f"the whole model is {'slower' if stored else 'not measurably faster'} with it "
        f"({speed.speedup:.2f}×, 95% {speed.low:.2f} to {speed.high:.2f})"
    )


def _settle_alone(choosing: Choosing, chosen: Chosen) -> tuple[Chosen, Quality, None]:
    """Put back every layer that alone is outside the limit."""
    assessor, feeds = choosing.assessor, []
    feeding = assessor.feeding
    if feeding is not None and isinstance(feeding.validation, Samples):
        judged = feeding.validation.take(_CHECKED_FEEDS * feeding.validation.batch)
        feeds = [feed for feed, _, _ in itertools.islice(judged.batches(), _CHECKED_FEEDS)]
    found, crashed = check_layers(
        assessor.prepared,
        choices_of(chosen),
        assessor.factory,
        feeds,
        assessor.options.seed,
        assessor.progress,
    )
    choosing.kept |= {name: f"put back: {why}" for name, why in crashed.items()}
    passed = {}
    for name, quality in found.items():
        if (why := assessor.over(quality)) is None:
            passed[name] = quality
        else:
            choosing.kept[name] = f"put back: {why}"
    return {name: chosen[name] for name in passed}, worst(passed), None
