"""The main job: candidates, search, rewrite, verification of the saved file, report."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxlr.assess import Assessor, calibration_samples
from onnxlr.calibrate import Statistics, calibrate, input_size, why_not
from onnxlr.choosing import Choosing
from onnxlr.cluster import Cluster
from onnxlr.data import Samples
from onnxlr.errors import BudgetError, OutputError, UsageError
from onnxlr.factory import Built, Factory, check_graph
from onnxlr.fidelity import Quality
from onnxlr.fits import Fit, fit_methods, name_filter
from onnxlr.graph_pass import GraphPass, WeightPass, choose_passes, find_pass
from onnxlr.influence import influences
from onnxlr.jobs import Jobs
from onnxlr.latency import Comparison
from onnxlr.latency_table import LatencyTable, machine_table, named_table
from onnxlr.layer_check import check_layers, worst
from onnxlr.layers import Layer
from onnxlr.model import Source, check_unchanged, count_params, load
from onnxlr.one_thread import one_thread
from onnxlr.options import Options
from onnxlr.output import (
    copy_source,
    left_over,
    name_within,
    place,
    read_back,
    workspace,
    write_failure,
    writing,
)
from onnxlr.plan import Calibration, Plan
from onnxlr.prepare import Feeding, Prepared, check_room, open_fed, prepare
from onnxlr.progress import Progress
from onnxlr.report import Report
from onnxlr.runtime import ONE_CPU_THREAD, Session
from onnxlr.search import Chosen, choices_of
from onnxlr.spectra import decompose
from onnxlr.store import Store, key_of, open_store
from onnxlr.telling import Outcome
from onnxlr.verify import Judge

EXPAND = "expand-at-load"  # the pass that the flag of this name adds
_CHECKED_FEEDS = 4  # that layers are compared alone on


@dataclass(frozen=True)
class Result:
    """What ``optimize`` gives: the model, the plan that replays it, and the report."""

    model: onnx.ModelProto
    plan: Plan
    report: Report


Texts = Callable[[Result], Mapping[Path, str]]  # what is to be written beside a result, and where


def optimize(
    source: Source, out: Path | None, options: Options, progress: Progress, texts: Texts
) -> Result:
    """Run every stage on a loaded model, and write the result if a path is given.

    The texts that tell of it are in full on their disks before the model takes its place.

    Raises
    ------
    OnnxlrError
        Whatever stage refuses; nothing is written then.
    """
    # One thread of linear algebra here as in the processes of --jobs: sums come out the same.
    with one_thread():
        return _optimize(source, out, options, progress, texts)


def _optimize(
    source: Source, out: Path | None, options: Options, progress: Progress, texts: Texts
) -> Result:
    started = time.perf_counter()
    passes = choose_passes(options.methods)
    if options.expand_at_load:
        passes += tuple(p for p in (find_pass(EXPAND),) if p not in passes)
    if all(p.takes(options.rank) is not None for p in passes):
        raise UsageError(
            f"--rank {options.rank} names {len(options.rank.numbers)} numbers, as many as none of "
            f"{', '.join(p.name for p in passes)} takes"
        )
    with _means(options, out, progress) as (folder, jobs):
        built, result = _run(source, out, options, passes, folder, jobs, progress, started)
        with writing(texts(result)):
            if out is not None:  # the last of all: nothing may fail after that
                place(built, out)
        return result


@contextlib.contextmanager
def _means(options: Options, out: Path | None, progress: Progress) -> Iterator[tuple[Path, Jobs]]:
    """A folder for the model while it is made, and who does the work."""
    with contextlib.ExitStack() as held:
        workers = None
        if options.dask is not None:
            with progress.stage(f"connect to {options.dask}", None):
                workers = held.enter_context(contextlib.closing(Cluster(options.dask)))
        folder = held.enter_context(workspace(out))
        yield folder, Jobs(options.jobs, options.machine.threads, folder.parent, workers)


def _run(
    source: Source,
    out: Path | None,
    options: Options,
    passes: Sequence[GraphPass],
    folder: Path,
    jobs: Jobs,
    progress: Progress,
    started: float,
) -> tuple[Path, Result]:
    """The file that is to take its place, and what is told of it."""
    excluded = name_filter(options.include, options.exclude)
    session, feeding = _open(source, options, progress)
    with progress.stage("infer shapes", None):
        prepared = prepare(
            source,
            feed=None if feeding is None else feeding.timed,
            machine=options.machine,
            shapes=options.shapes,
            batch=options.batch,
        )
    store = open_store()
    fits: dict[str, tuple[Fit, ...]] = {}
    kept: dict[str, str] = {}
    for layer in prepared.layers:
        why = excluded(layer)
        found, reasons = ((), (why,)) if why else fit_methods(layer, passes)
        fits[layer.name] = found
        if not found:
            kept[layer.name] = "; ".join(dict.fromkeys(reasons))
    if options.rank.needs_spectrum:  # now, where progress shows, not at the first look
        with progress.stage("decompose", len(fits)) as step:
            decompose(prepared, fits, jobs, store, step)
    statistics, calibration, origin = _calibrated(
        prepared, options, feeding, fits, store, jobs, progress
    )
    factory = Factory(
        prepared,
        folder,
        name_within(source, out),
        statistics,
        calibration.digest if calibration is not None else "",
        jobs,
        store,
        origin,
    )
    judge = table = None
    if options.verify != "none":
        table = _open_table(options, store)
    if options.verify == "full" and session is not None and feeding is not None:
        with progress.stage("run the original", None):
            judge = Judge(session, feeding.judged, options.metric)
    timed = judge is not None and options.measure and not (table and table.foreign)
    assessor = Assessor(prepared, options, factory, session, feeding, judge, timed, progress)
    choosing = Choosing(assessor, fits, kept, table, store)
    chosen, quality, speed = settle(choosing, choosing.choose())
    _save_times(table, options)
    built = _finished(assessor, chosen)
    check_unchanged(source)
    if calibration is not None and factory.corrects:
        calibration = replace(calibration, sequential=assessor.samples)
    outcome = Outcome(assessor, choosing, chosen, quality, speed)
    plan = Plan(source.digest, outcome.decisions(), options.seed, calibration if chosen else None)
    model = read_back(built.path, whole=out is None)
    label = None if out is None else str(out)
    old = [] if out is None else left_over(built.path, out)
    report = outcome.report(plan, built, label, time.perf_counter() - started, old)
    return built.path, Result(model, plan, report)


def _calibrated(
    prepared: Prepared,
    options: Options,
    feeding: Feeding | None,
    fits: Mapping[str, Sequence[Fit]],
    store: Store,
    jobs: Jobs,
    progress: Progress,
) -> tuple[dict[str, Statistics], Calibration | None, str]:
    """What layers are given, the samples it comes from, and a digest of all that factors are of."""
    digest = prepared.source.digest
    # At their numerical ranks factors are exact: inputs could only bring rounding in.
    wanted = options.rank.kind != "exact" and "data" not in options.without
    if feeding is None or feeding.calibration is None or not wanted:
        return {}, None, key_of(digest)
    fitted = [layer for layer in prepared.layers if fits[layer.name]]
    taken = calibration_samples(prepared, feeding.calibration)
    calibration = Calibration(
        str(options.data),
        feeding.half,
        taken.digest(),
        len(taken),
        options.batch,
        influence="sensitivity" not in options.without,
        layers=tuple(layer.name for layer in fitted),
    )
    key = statistics_key(prepared, calibration, options.seed)
    with _kept_statistics(store, key, fitted) as statistics:
        missing = [layer for layer in fitted if layer.name not in statistics]
        statistics |= calibrate_on(prepared, missing, taken, options.seed, progress, jobs)
    if calibration.influence:
        statistics = with_influence(prepared, statistics)
    return statistics, calibration, key_of(key, calibration.influence)


def statistics_key(prepared: Prepared, calibration: Calibration, seed: int) -> str:
    """What the statistics of layers that are looked at together depend on."""
    return key_of(
        prepared.source.digest, calibration.digest, seed, prepared.input_shapes, calibration.layers
    )


def _open(
    source: Source, options: Options, progress: Progress
) -> tuple[Session | None, Feeding | None]:
    """The original in the runtime, with what it is run on; neither where nothing is run whole."""
    if options.verify == "none" or (options.verify == "layers" and options.data is None):
        check_graph(source)
        return None, None
    with progress.stage("open the model", None):
        check_room(source, options.machine, 2)  # it, and what it becomes
        return open_fed(
            source,
            options.machine,
            data=options.data,
            validation=options.validation,
            labels=options.labels,
            shapes=options.shapes,
            batch=options.batch,
            seed=options.seed,
        )


@contextlib.contextmanager
def _kept_statistics(
    store: Store, key: str, layers: Sequence[Layer]
) -> Iterator[dict[str, Statistics]]:
    """Statistics that the store has of these layers; what is added is written back."""
    arrays = store.read_arrays("statistics", key)
    found = {
        name: Statistics(
            arrays[f"mean {name}"], arrays[f"covariance {name}"], int(arrays[f"rows {name}"])
        )
        for name in (layer.name for layer in layers if _are_statistics(arrays, layer))
    }
    before = len(found)
    yield found
    if len(found) > before:
        for name, item in found.items():
            arrays[f"mean {name}"], arrays[f"covariance {name}"] = item.mean, item.covariance
            arrays[f"rows {name}"] = np.array(item.rows)
        store.write_arrays("statistics", key, arrays)


def _are_statistics(arrays: Mapping[str, NDArray[Any]], layer: Layer) -> bool:
    """Whether there are arrays for a layer, and they are what its ``Statistics`` are made of."""
    if why_not(layer) is not None:
        return False
    size = input_size(layer)
    shapes = {"mean": (layer.group, size), "covariance": (layer.group, size, size), "rows": ()}
    for word, shape in shapes.items():
        array = arrays.get(f"{word} {layer.name}")
        kind = "i" if word == "rows" else "f"
        if array is None or array.shape != shape or array.dtype.kind != kind:
            return False
        if not np.isfinite(array).all():
            return False
    return True


def calibrate_on(
    prepared: Prepared,
    layers: Sequence[Layer],
    samples: Samples,
    seed: int,
    progress: Progress,
    jobs: Jobs,
) -> dict[str, Statistics]:
    """Statistics of these layers; on one CPU thread, so that a replay has the same to the bit."""
    return calibrate(prepared, layers, samples, ONE_CPU_THREAD, seed, progress, jobs)


def with_influence(
    prepared: Prepared, statistics: Mapping[str, Statistics]
) -> dict[str, Statistics]:
    """Statistics by which errors of outputs count as the layers behind take them."""
    metrics = influences(prepared)
    return {name: replace(item, metric=metrics.get(name)) for name, item in statistics.items()}


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
    if feeding is not None and isinstance(feeding.judged, Samples):
        judged = feeding.judged.take(_CHECKED_FEEDS * feeding.judged.batch)
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


def _finished(assessor: Assessor, chosen: Chosen) -> Built:
    """The file to hand over: the one that was verified, or the original."""
    factory = assessor.factory
    if not chosen:
        source = factory.prepared.source
        path, nbytes = copy_source(source, factory.folder, factory.file_name)
        return Built(path, nbytes, count_params(source.model))
    built = factory.build(choices_of(chosen))
    if assessor.judge is None:
        check_graph(load(built.path))
    return built


def _open_table(options: Options, store: Store) -> LatencyTable:
    if options.latency_table is None:
        return machine_table(options.machine, store, measures=options.measure)
    return named_table(options.machine, Path(options.latency_table), measures=options.measure)


def _save_times(table: LatencyTable | None, options: Options) -> None:
    try:
        if table is not None:
            table.save()
    except OSError as error:
        if (path := options.latency_table) is not None:  # the user's own; the cache may fail
            raise OutputError(write_failure(Path(path), error)) from None
