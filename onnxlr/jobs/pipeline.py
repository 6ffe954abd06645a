"""The main job, stage by stage: from a model as the user gave it to one that is written."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx

from onnxlr.calibrate.stage import Calibrated
from onnxlr.courses.beginning import Base, Beginning
from onnxlr.courses.course import follow, stay
from onnxlr.errors import ModelError, OutputError, UsageError
from onnxlr.methods.base import GraphPass
from onnxlr.methods.channels import INTERPOLATIVE, names_channels
from onnxlr.methods.registry import choose_passes, find_pass
from onnxlr.model.constants import count_params
from onnxlr.model.load import Source, check_unchanged, load
from onnxlr.model.onnx_checker import run_onnx_checker
from onnxlr.model.place import move_into_place
from onnxlr.model.save import copy_source, read_back, working_name
from onnxlr.options import Options
from onnxlr.plan.combined import compare_combined
from onnxlr.plan.estimate import estimate
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.plan import Plan
from onnxlr.plan.settle import Selection, settle
from onnxlr.prepare.feeding import Feeding, open_with_feeding
from onnxlr.prepare.opening import check_memory, opening_words
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.progress import Progress
from onnxlr.report.explain import Outcome
from onnxlr.report.report import Report
from onnxlr.rewrite.builder import Builder, Built
from onnxlr.rewrite.factorizer import Factorizer
from onnxlr.rewrite.finish import Finish, finish_original
from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.system.cache import Cache, open_cache
from onnxlr.system.cluster import Cluster
from onnxlr.system.files import staged_texts, workspace, write_failure
from onnxlr.system.pool import Pool
from onnxlr.system.session import NO_KERNEL, Session
from onnxlr.system.time_limit import TimeLimit
from onnxlr.verify.endings import endings
from onnxlr.verify.examination import Examination, doubts_of, examine, open_judged
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency_table import LatencyTable, machine_table, named_table
from onnxlr.widths.narrowing import reader_names

EXPAND = "expand-at-load"  # the pass that the flag of this name adds

# What to do about operators that the runtime has no kernel for, by --verify.
_WITHOUT_RUNNING = {
    "full": "--verify layers doesn't run it, and compares each replaced layer alone",
    "layers": "leave out --data to compare each layer on random inputs",
}


@dataclass(frozen=True)
class Result:
    """What ``optimize`` gives: the model, the plan that replays it, and the report."""

    model: onnx.ModelProto
    plan: Plan
    report: Report


Texts = Callable[[Result], Mapping[Path, str]]  # what is to be written beside a result, and where


@dataclass(frozen=True)
class _Resources:
    """What a run works with: a folder for the model while it is made, workers, and the cache."""

    folder: Path
    pool: Pool
    cache: Cache


def optimize(
    source: Source, out: Path | None, options: Options, progress: Progress, texts: Texts
) -> Result:
    """Run every stage on a loaded model, and write the result where there is a path.

    The texts that tell of it are in full on their disks before the model takes its place.

    Raises
    ------
    OnnxlrError
        Whatever stage refuses; nothing is written then.
    """
    passes = _passes(options)
    # One thread of linear algebra here as in the processes of --jobs: sums come out the same.
    with one_blas_thread(), _resources(options, out, progress) as resources:
        started, limit = time.perf_counter(), TimeLimit(options.time_limit)

        session, feeding = _open(source, options, progress)
        prepared = _prepare(source, feeding, options, progress)
        examination = _examine(prepared, session, feeding, options, progress)
        finish = _finish_original(source, feeding, options, resources, progress)
        begin = Beginning(
            *(options, passes, feeding, resources.folder.parent, resources.pool, resources.cache),
            progress,
        )
        fits, widths = begin.fit(prepared), begin.widths(prepared, examination)
        calibrated = begin.calibrate(prepared, fits, reader_names(widths))
        table = _open_table(options, resources.cache)
        evaluator = _evaluator(
            *(prepared, calibrated, session, feeding, examination, table, limit),
            *(working_name(source, out), options, resources, progress, finish),
        )
        if (line := estimate(evaluator, fits, table)) is not None:
            progress.tell(line)
        original = Base(evaluator, fits, calibrated)
        why = evaluator.why_hopeless
        if why is None:
            path = begin.narrow(original, widths)
            courses = follow(original, path, partial(begin.narrowed, original), table)
        else:
            progress.tell(why)
            path, courses = stay(original, widths, why)
        examiner = _open_examiner(examination, progress, courses.ladder.largest_difference)
        selection = settle(evaluator, courses.ladder, examiner)
        built = _hand_over(evaluator, selection, table)
        combined = compare_combined(evaluator, selection, examiner, built)

        outcome = Outcome(courses, table, selection, built, widths, path, combined)
        result = Result(
            read_back(built.path, whole=out is None),
            outcome.plan,
            outcome.report(out, time.perf_counter() - started),
        )
        with staged_texts(texts(result)):
            if options.behind_out is not None:
                _write_behind(evaluator, selection, built, Path(options.behind_out))
            if out is not None:  # the last of all: nothing may fail after that
                move_into_place(built.path, out)
        return result


def _passes(options: Options) -> tuple[GraphPass, ...]:
    """The passes that take part.

    Raises
    ------
    UsageError
        If one isn't installed, none takes so many numbers as the rank names, or channels were to
        go from a model that isn't judged as a whole.
    """
    if names_channels(options.methods) and options.verify != "full":
        raise UsageError(
            f"--method {INTERPOLATIVE.name} changes several layers at once, which --verify "
            f"{options.verify} can't judge: leave one of them out"
        )
    passes = choose_passes(options.methods)
    if options.expand_at_load:
        passes += tuple(p for p in (find_pass(EXPAND),) if p not in passes)
    named = passes and not names_channels(options.methods)
    if named and all(p.takes(options.rank) is not None for p in passes):
        raise UsageError(
            f"--rank {options.rank} names {len(options.rank.numbers)} numbers, and none of "
            f"{', '.join(p.name for p in passes)} takes so many"
        )
    return passes


@contextlib.contextmanager
def _resources(options: Options, out: Path | None, progress: Progress) -> Iterator[_Resources]:
    with contextlib.ExitStack() as stack:
        workers = None
        if options.dask is not None:
            with progress.stage(f"connect to {options.dask}", None):
                workers = stack.enter_context(contextlib.closing(Cluster(options.dask)))
        folder = stack.enter_context(workspace(out))
        pool = Pool(options.jobs, options.machine.threads, folder.parent, workers)
        cache = open_cache()
        stack.callback(cache.make_room)  # latencies are written past it
        yield _Resources(folder, pool, cache)


def _open(
    source: Source, options: Options, progress: Progress
) -> tuple[Session | None, Feeding | None]:
    """The original in the runtime, with what it is run on; neither where nothing is run whole."""
    if options.verify == "none" or (options.verify == "layers" and options.data is None):
        run_onnx_checker(source, plugins=options.verify == "layers")
        return None, None
    with progress.stage(opening_words(options.machine), None):
        # It, what it becomes, and the same after the step of ``--behind``.
        check_memory(source, options.machine, 2 if options.behind is None else 3)
        try:
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
        except ModelError as error:
            if any(words in str(error) for words in NO_KERNEL):
                raise ModelError(f"{error}; {_WITHOUT_RUNNING[options.verify]}") from None
            raise


def _prepare(
    source: Source, feeding: Feeding | None, options: Options, progress: Progress
) -> Prepared:
    """The model with its shapes and layers."""
    with progress.stage("infer shapes", None):
        return prepare(
            source,
            feed=None if feeding is None else feeding.first_feed,
            machine=options.machine,
            shapes=options.shapes,
            batch=options.batch,
        )


def _open_table(options: Options, cache: Cache) -> LatencyTable | None:
    """The latencies of this machine, or of the file that was named; None where nothing runs."""
    if options.verify == "none":
        return None
    machine, limits = options.machine, options.limits
    measures, remeasure = options.measure, options.remeasure
    if options.latency_table is None:
        return machine_table(machine, cache, measures=measures, remeasure=remeasure, limits=limits)
    path = Path(options.latency_table)
    return named_table(machine, path, measures=measures, remeasure=remeasure, limits=limits)


def _examine(
    prepared: Prepared,
    session: Session | None,
    feeding: Feeding | None,
    options: Options,
    progress: Progress,
) -> Examination | None:
    """Who judges models as a whole; None where nobody does."""
    if options.verify != "full" or session is None or feeding is None:
        return None
    with progress.stage("run the original", None):
        session = open_judged(prepared, session, feeding)
        examination = examine(
            *(session, feeding, options.metric, options.max_drop, options.confidence),
            endings(prepared.model),
        )
    if examination.promise.choice_line:
        progress.tell(examination.promise.choice_line)
    if examination.judge.random_line:
        progress.tell(examination.judge.random_line)
    progress.tell(examination.promise.scope())
    for doubt in doubts_of(feeding, examination.judge):
        progress.tell(f"warning: {doubt}")
    return examination


def _finish_original(
    source: Source,
    feeding: Feeding | None,
    options: Options,
    resources: _Resources,
    progress: Progress,
) -> Finish | None:
    """The original after the step of ``--behind``; None without one."""
    if options.behind is None or feeding is None:
        return None
    with progress.stage(f"{options.behind} on the original", None):
        folder = resources.folder.parent / "behind"
        return finish_original(source, options.behind, feeding, options.machine, folder)


def _open_examiner(examined: Examination | None, progress: Progress, seen: float) -> Judge | None:
    """The judge of the test samples, who comes in when the ladder is made."""
    if examined is None:
        return None
    with progress.stage("run the original", None):
        return examined.open_examiner(seen)


def _evaluator(
    prepared: Prepared,
    calibrated: Calibrated,
    session: Session | None,
    feeding: Feeding | None,
    examination: Examination | None,
    table: LatencyTable | None,
    limit: TimeLimit,
    file_name: str,
    options: Options,
    resources: _Resources,
    progress: Progress,
    finish: Finish | None,
) -> Evaluator:
    """What builds, judges and times variants of the model."""
    judge = None if examination is None else examination.judge
    folder, pool, cache = resources.folder, resources.pool, resources.cache
    return Evaluator(
        prepared,
        options,
        Factorizer(prepared, folder.parent, calibrated.statistics, pool, cache, calibrated.origin),
        Builder(prepared, folder, file_name, calibrated.digest),
        session,
        feeding,
        judge,
        calibrated.calibration,
        None if examination is None else examination.promise,
        limit,
        timed=judge is not None and options.measure and not (table and table.foreign),
        progress=progress,
        finish=finish,
    )


def _hand_over(evaluator: Evaluator, selection: Selection, table: LatencyTable | None) -> Built:
    """The file to hand over: the one that was verified, or the original."""
    _save_times(table, evaluator.options)
    builder, source = evaluator.builder, evaluator.original.source
    if selection.variant.changes_anything:
        built = builder.build(selection.variant)
        if evaluator.judge is None:
            run_onnx_checker(load(built.path), plugins=evaluator.options.verify == "layers")
    else:
        path, nbytes = copy_source(source, builder.folder, builder.file_name)
        built = Built(path, nbytes, count_params(source.model))
    check_unchanged(source)
    return built


def _write_behind(evaluator: Evaluator, selection: Selection, built: Built, out: Path) -> None:
    """Write the file behind the one to hand over: what was judged."""
    assert evaluator.finish is not None
    changed = selection.variant.changes_anything
    made = load((evaluator.finished(built) if changed else evaluator.finish.original).path)
    with workspace(out) as folder:
        path, _ = copy_source(made, folder, working_name(made, out))
        move_into_place(path, out)


def _save_times(table: LatencyTable | None, options: Options) -> None:
    try:
        if table is not None:
            table.save()
    except OSError as error:
        if (path := options.latency_table) is not None:  # the user's file; the cache may fail
            raise OutputError(write_failure(Path(path), error)) from None
