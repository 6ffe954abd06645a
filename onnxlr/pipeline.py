"""The main job: candidates, search, rewrite, verification of the saved file, report."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from onnxlr.calibrate.stage import calibrated
from onnxlr.candidates.fits import Fit, fit_methods
from onnxlr.candidates.spectra import decompose
from onnxlr.errors import OutputError, UsageError
from onnxlr.layers.select import name_filter
from onnxlr.methods.base import GraphPass
from onnxlr.methods.registry import choose_passes, find_pass
from onnxlr.model.graph import count_params
from onnxlr.model.load import Source, check_unchanged, load
from onnxlr.model.onnx_checker import run_onnx_checker
from onnxlr.model.place import move_into_place, unused_data_files
from onnxlr.model.save import copy_source, read_back, working_name
from onnxlr.options import Options
from onnxlr.plan.choose import Choosing
from onnxlr.plan.evaluate import Assessor
from onnxlr.plan.plan import Plan
from onnxlr.plan.search import Chosen, choices_of
from onnxlr.plan.settle import settle
from onnxlr.prepare.feeding import Feeding, check_memory, open_with_feeding
from onnxlr.prepare.prepared import prepare
from onnxlr.progress import Progress
from onnxlr.report.explain import Outcome
from onnxlr.report.report import Report
from onnxlr.rewrite.builder import Built, Factory
from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.system.cache import Cache, open_cache
from onnxlr.system.cluster import Cluster
from onnxlr.system.files import staged_texts, workspace, write_failure
from onnxlr.system.pool import Pool
from onnxlr.system.session import Session
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency_table import LatencyTable, machine_table, named_table

EXPAND = "expand-at-load"  # the pass that the flag of this name adds


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
    with one_blas_thread():
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
    with _means(options, out, progress) as (folder, pool):
        built, result = _run(source, out, options, passes, folder, pool, progress, started)
        with staged_texts(texts(result)):
            if out is not None:  # the last of all: nothing may fail after that
                move_into_place(built, out)
        return result


@contextlib.contextmanager
def _means(options: Options, out: Path | None, progress: Progress) -> Iterator[tuple[Path, Pool]]:
    """A folder for the model while it is made, and who does the work."""
    with contextlib.ExitStack() as held:
        workers = None
        if options.dask is not None:
            with progress.stage(f"connect to {options.dask}", None):
                workers = held.enter_context(contextlib.closing(Cluster(options.dask)))
        folder = held.enter_context(workspace(out))
        yield folder, Pool(options.jobs, options.machine.threads, folder.parent, workers)


def _run(
    source: Source,
    out: Path | None,
    options: Options,
    passes: Sequence[GraphPass],
    folder: Path,
    pool: Pool,
    progress: Progress,
    started: float,
) -> tuple[Path, Result]:
    """The file that is to take its place, and what is told of it."""
    excluded = name_filter(options.include, options.exclude)
    session, feeding = _open(source, options, progress)
    with progress.stage("infer shapes", None):
        prepared = prepare(
            source,
            feed=None if feeding is None else feeding.first_feed,
            machine=options.machine,
            shapes=options.shapes,
            batch=options.batch,
        )
    cache = open_cache()
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
            decompose(prepared, fits, pool, cache, step)
    fitted = [layer for layer in prepared.layers if fits[layer.name]]
    statistics, calibration, origin = calibrated(
        prepared, options, feeding, fitted, cache, pool, progress
    )
    factory = Factory(
        prepared,
        folder,
        working_name(source, out),
        statistics,
        calibration.digest if calibration is not None else "",
        pool,
        cache,
        origin,
    )
    judge = table = None
    if options.verify != "none":
        table = _open_table(options, cache)
    if options.verify == "full" and session is not None and feeding is not None:
        with progress.stage("run the original", None):
            judge = Judge(session, feeding.validation, options.metric)
    timed = judge is not None and options.measure and not (table and table.foreign)
    assessor = Assessor(prepared, options, factory, session, feeding, judge, timed, progress)
    choosing = Choosing(assessor, fits, kept, table, cache)
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
    old = [] if out is None else unused_data_files(built.path, out)
    report = outcome.report(plan, built, label, time.perf_counter() - started, old)
    return built.path, Result(model, plan, report)


def _open(
    source: Source, options: Options, progress: Progress
) -> tuple[Session | None, Feeding | None]:
    """The original in the runtime, with what it is run on; neither where nothing is run whole."""
    if options.verify == "none" or (options.verify == "layers" and options.data is None):
        run_onnx_checker(source)
        return None, None
    with progress.stage("open the model", None):
        check_memory(source, options.machine, 2)  # it, and what it becomes
        return open_with_feeding(
            source,
            options.machine,
            data=options.data,
            validation=options.validation,
            labels=options.labels,
            shapes=options.shapes,
            batch=options.batch,
            seed=options.seed,
        )


def _finished(assessor: Assessor, chosen: Chosen) -> Built:
    """The file to hand over: the one that was verified, or the original."""
    factory = assessor.factory
    if not chosen:
        source = factory.prepared.source
        path, nbytes = copy_source(source, factory.folder, factory.file_name)
        return Built(path, nbytes, count_params(source.model))
    built = factory.build(choices_of(chosen))
    if assessor.judge is None:
        run_onnx_checker(load(built.path))
    return built


def _open_table(options: Options, cache: Cache) -> LatencyTable:
    if options.latency_table is None:
        return machine_table(options.machine, cache, measures=options.measure)
    return named_table(options.machine, Path(options.latency_table), measures=options.measure)


def _save_times(table: LatencyTable | None, options: Options) -> None:
    try:
        if table is not None:
            table.save()
    except OSError as error:
        if (path := options.latency_table) is not None:  # the user's own; the cache may fail
            raise OutputError(write_failure(Path(path), error)) from None
