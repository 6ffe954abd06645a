"""Replaying a plan on the model that it was made for."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from onnxlr.calibrate.calibration import Calibration
from onnxlr.calibrate.stage import calibrate_as, uncalibrated
from onnxlr.calibrate.statistics import Statistics
from onnxlr.errors import DataError, UsageError
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice
from onnxlr.model.load import Source, check_unchanged
from onnxlr.model.place import move_into_place
from onnxlr.model.save import copy_source, read_back, working_name
from onnxlr.plan.plan import Plan
from onnxlr.plan.width_plan import WidthPlan
from onnxlr.prepare.feeding import first_feed, runnable_feed
from onnxlr.prepare.opening import trial_run
from onnxlr.prepare.originals import Originals
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.prepare.samples import Samples, load_samples
from onnxlr.progress import Progress
from onnxlr.rewrite.builder import Builder
from onnxlr.rewrite.factorizer import Factorizer
from onnxlr.rewrite.sequential import correct
from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.system.cache import open_cache
from onnxlr.system.files import workspace
from onnxlr.system.in_memory import Data
from onnxlr.system.pool import Pool
from onnxlr.system.session import ONE_CPU_THREAD, Feed
from onnxlr.widths.narrowing import Narrower, Narrowing, moments_for, widths_of


def replay(
    plan: Plan, source: Source, path: Path | None, data: Data | None, progress: Progress
) -> onnx.ModelProto:
    """Build what a plan says, from the samples that it was made with.

    Parameters
    ----------
    plan : Plan
    source : Source
    path : Path or None
        Where the model goes.
    data : str, Path or None
        Where the samples are, if they have moved.
    progress : Progress

    Raises
    ------
    UsageError
        If the plan is for another model, or its samples aren't there.
    """
    if plan.model != source.digest:
        raise UsageError(
            f"the plan is for a model with digest {plan.model[:12]}…, {source.label} has "
            f"{source.digest[:12]}…: make a plan for this one"
        )
    # As when the plan was made: sums come out the same to the bit.
    with one_blas_thread(), workspace(path) as folder:
        pool = Pool(None, folder=folder.parent)
        built = _build(plan, source, working_name(source, path), data, folder, pool, progress)
        check_unchanged(source)
        model = read_back(built, whole=path is None)
        if path is not None:  # the last of all: nothing may fail after that
            move_into_place(built, path)
        return model


def _build(
    plan: Plan,
    source: Source,
    file_name: str,
    data: Data | None,
    folder: Path,
    pool: Pool,
    progress: Progress,
) -> Path:
    """The file that a plan makes."""
    prepared, cache = prepare(source, feed=None), open_cache()
    plan = plan.named_as(prepared.layers)
    choices = plan.choices()
    if not choices and not plan.widths.kept:
        return copy_source(source, folder, file_name)[0]
    original, fitted, feed = prepared, None, None
    calibrated = uncalibrated(prepared)
    if plan.calibration is not None:
        if not plan.widths.kept:  # else the layers aren't there yet
            _check_fit(prepared, choices)
        samples, fitted = _calibration_samples(plan, plan.calibration, prepared, data)
        # Shapes count here too: which inputs can be looked at, and what layers make of others.
        feed = first_feed(samples, plan.calibration.batch)
        trial_run(source, ONE_CPU_THREAD, feed)
        prepared = original = prepare(source, feed=feed)
    elif plan.widths.kept and not _shows(prepared, plan.widths):
        # Some shapes only a run tells, and with them who carries channels.
        feed = runnable_feed(source, ONE_CPU_THREAD, plan.widths.inputs, plan.seed)
        prepared = original = prepare(source, feed=feed)
    narrowing = None
    if plan.widths.kept:
        narrowing = _narrowed(plan, original, fitted, feed, folder.parent, pool, progress)
        prepared = narrowing.prepared
    _check_fit(prepared, choices)
    by_data = plan.calibration is not None and bool(plan.calibration.layers or not narrowing)
    if plan.calibration is not None and fitted is not None and choices and by_data:
        names = plan.calibration.layers or tuple(choices)
        layers = [layer for layer in prepared.layers if layer.name in names]
        calibrated = calibrate_as(
            *(prepared, layers, fitted, plan.calibration, plan.seed, cache, pool, progress)
        )
    factorizer = Factorizer(
        *(prepared, folder.parent, calibrated.statistics, pool, cache, calibrated.origin),
        narrowing,
    )
    with progress.stage("decompose", len(choices)) as step:
        variant = factorizer.variant(choices, step)
    if fitted is not None and plan.calibration is not None and plan.calibration.sequential:
        samples = fitted.take(plan.calibration.sequential)
        variant = correct(
            *(prepared, variant, calibrated.statistics, samples, plan.seed, progress),
            Originals(prepared),
            processes=pool.count,
        )
    digest = "" if plan.calibration is None else plan.calibration.digest
    with progress.stage("write", None):
        return Builder(original, folder, file_name, digest).build(variant).path


def _shows(prepared: Prepared, planned: WidthPlan) -> bool:
    """Whether the widths that a plan narrows are there, written, carried and read by the same."""
    widths = {width.name: width for width in widths_of(prepared).usable}
    return all(
        (width := widths.get(row.name)) is not None
        and width.size == row.size
        and (width.writers, width.readers, width.carriers)
        == (row.writers, row.readers, row.carriers)
        for row in planned.decisions
        if row.kept is not None
    )


def _check_fit(prepared: Prepared, choices: Mapping[str, Choice]) -> None:
    """Refuse a plan whose choices can't be carried out."""
    layers = {layer.name: layer for layer in prepared.layers}
    for name, choice in choices.items():
        refusal = _misfit(layers.get(name), choice)
        if refusal is not None:
            raise UsageError(f"the plan replaces {name!r}, but {refusal}")


def _narrowed(
    plan: Plan,
    prepared: Prepared,
    fitted: Samples | None,
    feed: Feed | None,
    scratch: Path,
    pool: Pool,
    progress: Progress,
) -> Narrowing:
    """The model with fewer channels that a plan makes."""
    widths, cache, kept = widths_of(prepared), open_cache(), plan.widths.kept
    usable = {width.name: width for width in widths.usable}
    for row in plan.widths.decisions:
        if row.kept is None:
            continue
        width = usable.get(row.name)
        if width is None or width.size != row.size:
            raise UsageError(
                f"the plan narrows {row.name!r}, but there is no such width of {row.size} channels"
            )
        if not width.alike_in_heads(row.kept):
            raise UsageError(
                f"the plan keeps more channels of some of the {width.heads} heads of {row.name!r} "
                "than of others"
            )
    statistics: Mapping[str, Statistics] = {}
    if fitted is not None and plan.calibration is not None:
        names = plan.widths.layers
        layers = [layer for layer in prepared.layers if layer.name in names]
        calibration = replace(plan.calibration, layers=names, influence=False)
        statistics = calibrate_as(
            *(prepared, layers, fitted, calibration, plan.seed, cache, pool, progress)
        ).statistics
    moments = moments_for(prepared, statistics, fitted, plan.seed)
    digest = "" if plan.calibration is None else plan.calibration.digest
    narrower = Narrower(prepared, widths, statistics, moments, scratch, digest, feed)
    if plan.widths.sequential and fitted is not None:
        samples = fitted.take(plan.widths.sequential)
        return narrower.corrected(kept, samples, plan.seed, progress)
    return narrower.narrow(kept)


def _calibration_samples(
    plan: Plan, calibration: Calibration, prepared: Prepared, data: Data | None
) -> tuple[Samples, Samples]:
    """The samples that a plan's factors could be fitted to, and those that they were fitted to."""
    path = data if data is not None else calibration.data
    try:
        samples = load_samples(path, prepared.specs, None)
    except DataError as error:
        raise UsageError(
            f"the plan's factors were fitted to samples of {calibration.data}: {error}; name the "
            "samples with --data"
        ) from None
    if (count := calibration.count(len(samples))) < len(samples):
        (samples,) = samples.in_parts(plan.seed, count)
    fitted = samples.take(calibration.samples)
    if fitted.digest() != calibration.digest:
        raise UsageError(
            f"{path} doesn't hold the samples that the plan's factors were fitted to: name those "
            "with --data, or make a new plan"
        )
    return samples, fitted


def _misfit(layer: Layer | None, choice: Choice) -> str | None:
    """Why a plan's choice can't be carried out on a layer."""
    if layer is None:
        return "there is no such layer"
    graph_pass = choice.graph_pass
    has_shapes = all(use.x_shape is not None for use in layer.uses)
    # Nothing is run here: what only a run shows of shapes was looked at when the plan was made.
    refuses = graph_pass.refuse(layer) if has_shapes or layer.op not in graph_pass.ops else None
    barred = graph_pass.barred(layer)
    if (reason := barred or refuses) is not None:
        return reason
    return graph_pass.misfit(layer, choice.rank)
