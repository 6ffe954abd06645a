"""Widths weighed: in which order channels go, and what that does to the model, measured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxlr.courses.channels import WidthOffer, kept_of
from onnxlr.decompose.interpolative import Reading, elimination
from onnxlr.errors import ModelError
from onnxlr.model.save import save
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.sensitivity import Sensitivity
from onnxlr.prepare.prepared import Prepared
from onnxlr.system.files import scratch_folder
from onnxlr.system.session import Session
from onnxlr.verify.judge import Judge
from onnxlr.widths.find import Width
from onnxlr.widths.narrow import Kept, Solved, narrowed
from onnxlr.widths.narrowing import Narrower
from onnxlr.widths.places import inputs_known
from onnxlr.widths.readings import layer_moments, readers_of, reading

_PROBED_ERROR = 0.25  # of what is read, at which a width's sensitivity is measured
_MODELS = 6  # of the model's size, that a process takes which runs it beside another
_READINGS = 8  # arrays of C × C that choosing channels takes


def offers_of(evaluator: Evaluator, narrower: Narrower) -> list[WidthOffer]:
    """Every width that may be narrowed, with the order of its channels and its sensitivity."""
    widths = narrower.widths.usable
    pool = evaluator.factorizer.pool
    with evaluator.progress.stage("order channels", len(widths)) as step:
        readings = [_readings(narrower, width) for width in widths]
        rows = [(r, w.heads) for w, r in zip(widths, readings, strict=True) if r]
        needs = _READINGS * 8 * max((r[0].moments.size for r, _ in rows), default=0)
        results = iter(pool.map(elimination, rows, needs=needs))
        offers = []
        for width, found in zip(widths, readings, strict=True):
            if found:
                offers.append(WidthOffer(width, next(results)))
            step(width.name)
    options = evaluator.options
    weighed = options.rank.kind == "auto" and "sensitivity" not in options.without
    if evaluator.judge is None or not offers or not weighed:
        return offers
    return _probed(evaluator, narrower, evaluator.probing, offers)


def _readings(narrower: Narrower, width: Width) -> list[Reading]:
    """What reads a width; nothing where a reader has seen nothing of it."""
    readings = []
    for cut, places in readers_of(narrower.widths, width):
        statistics = inputs_known(cut.layer, narrower.statistics.get(cut.layer.name))
        if statistics is not None:
            moments = layer_moments(cut, places, statistics)
            metric = None if statistics.metric is None else statistics.metric[0]
        elif (cut.layer.name, width.name) in narrower.moments:
            moments, metric = narrower.moments[cut.layer.name, width.name], None
        else:
            return []
        readings.append(reading(cut, places, moments, metric))
    return readings


def _probed(
    evaluator: Evaluator, narrower: Narrower, judge: Judge, offers: Sequence[WidthOffer]
) -> list[WidthOffer]:
    """Widths with what errors of what is read do to the model, each measured by itself."""
    factorizer = evaluator.factorizer
    by_classes = evaluator.verdicts.by_classes
    items: list[tuple[Kept, dict[str, Solved], float]] = []
    for offer in offers:
        numbers = range(offer.width.heads, offer.width.size, offer.width.heads)
        count = min(numbers, key=lambda n: abs(offer.error(n) - _PROBED_ERROR))
        kept = kept_of([offer], {offer.width.name: count})
        items.append((kept, narrower.solved(kept), offer.error(count)))
    probed = []
    with (
        evaluator.progress.stage("measure sensitivities of widths", len(items)) as step,
        scratch_folder(factorizer.scratch, "probes-") as folder,
    ):
        needs = _MODELS * narrower.origin.source.nbytes
        results = factorizer.pool.map(
            probe_width, items, narrower.origin, judge, folder, needs=needs
        )
        for offer, row in zip(offers, results, strict=True):
            step(offer.width.name)
            if "refusal" not in row:
                sensitivity = Sensitivity.from_probes([row], by_classes=by_classes)
                probed.append(WidthOffer(offer.width, offer.elimination, sensitivity))
    return probed


def probe_width(
    prepared: Prepared,
    judge: Judge,
    folder: Path,
    kept: Kept,
    solved: Mapping[str, Solved],
    error: float,
) -> dict[str, Any]:
    """What a narrowed width does to the model: a row as ``sensitivity.probe`` gives it."""
    try:
        model = narrowed(prepared.model, prepared.shapes, kept, solved)
        here = folder if folder.is_dir() else None  # else this is a worker on another machine
        with scratch_folder(here, "probe-") as place:
            save(model, place / "probe.onnx", outside=bool(prepared.source.external))
            session = Session(place / "probe.onnx", judge.machine, "the optimized model")
            fidelity = judge.judge(session).fidelity
    except ModelError as refusal:
        return {"refusal": str(refusal)}
    harm = fidelity.rel_error if math.isfinite(fidelity.rel_error) else None
    return {"error": error, "harm": harm, "divergence": fidelity.divergence}
