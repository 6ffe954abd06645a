"""The main job: candidates, search, rewrite, verification of the saved file, report."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

from onnxlr import latency
from onnxlr.allocation import allocate
from onnxlr.calibrate import Statistics, calibrate
from onnxlr.cost import layer_work
from onnxlr.data import Samples
from onnxlr.errors import BudgetError, ModelError, OutputError, UsageError
from onnxlr.factory import Built, Factory, check_graph
from onnxlr.graph_pass import WeightPass, choose_passes, find_pass
from onnxlr.jobs import Jobs
from onnxlr.latency import Comparison, compare_sessions, time_session
from onnxlr.latency_table import LatencyTable, machine_table, named_table
from onnxlr.layer_check import check_layers, worst
from onnxlr.layer_timing import LayerTime
from onnxlr.layers import Layer, count_macs
from onnxlr.model import Source, count_params, load
from onnxlr.options import Options
from onnxlr.output import copy_source, place, workspace, write_failure
from onnxlr.plan import (
    UNVERIFIED_AUTO_ERROR,
    Calibration,
    Candidate,
    Fit,
    Goal,
    Plan,
    auto_candidates,
    fit_methods,
    name_filter,
    named_candidates,
)
from onnxlr.prepare import Feeding, Prepared, feed_model, open_source, prepare
from onnxlr.progress import Progress
from onnxlr.report import Report
from onnxlr.rewrite import Choice
from onnxlr.runtime import ONE_CPU_THREAD, Session
from onnxlr.search import Chosen, Trials, boldest
from onnxlr.sequential import correct
from onnxlr.store import Store, key_of, open_store
from onnxlr.telling import Outcome, saved_macs
from onnxlr.verify import Judge, Quality
from onnxlr.weighing import Aim, Weighing

EXPAND = "expand-at-load"  # the pass that the flag of this name adds

CALIBRATION_SAMPLES = 1024
PROBED_SAMPLES = 64  # that sensitivities are measured on
# Predicted squared relative errors of the model's outputs, among which a search bisects.
DAMAGES = tuple(float(d) for d in np.logspace(-5, 0.5, 23))
SEQUENCE_SAMPLES = 512  # that sequential correction looks at, where a minute is enough for them
_SEQUENCE_SECONDS = 60.0
_FEWEST_SAMPLES = 32
_BOLDER = 2  # further levels that are tried with it
_CORRECTIONS = 5  # of a budget that the written file misses
_CHECKED_FEEDS = 4  # that layers are compared alone on
_BOLDEST_ERROR = 0.9  # of a weight, where there is no limit

# Of the methods that fit a layer at a level, how many of the most saving are timed.
_TIMED_METHODS = 3


@dataclass(frozen=True)
class Result:
    """What ``optimize`` gives: the model, the plan that replays it, and the report."""

    model: onnx.ModelProto
    plan: Plan
    report: Report


def optimize(source: Source, out: Path | None, options: Options, progress: Progress) -> Result:
    """Run every stage on a loaded model, and write the result if a path is given.

    Raises
    ------
    OnnxlrError
        Whatever stage refuses; nothing is written then.
    """
    # One thread of linear algebra here as in the processes of --jobs: sums come out the same.
    with threadpool_limits(1):
        return _optimize(source, out, options, progress)


def _optimize(source: Source, out: Path | None, options: Options, progress: Progress) -> Result:
    started = time.perf_counter()
    passes = choose_passes(options.methods)
    if options.expand_at_load:
        passes += tuple(p for p in (find_pass(EXPAND),) if p not in passes)
    if all(p.takes(options.rank) is not None for p in passes):
        raise UsageError(
            f"--rank {options.rank} names {len(options.rank.numbers)} numbers, as many as none of "
            f"{', '.join(p.name for p in passes)} takes"
        )
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
    fits: dict[str, tuple[Fit, ...]] = {}
    kept: dict[str, str] = {}
    with progress.stage("decompose", len(prepared.layers)) as step:
        for layer in prepared.layers:
            why = excluded(layer)
            found, reasons = ((), (why,)) if why else fit_methods(layer, passes)
            fits[layer.name] = found
            if not found:
                kept[layer.name] = "; ".join(dict.fromkeys(reasons))
            if options.rank.needs_spectrum:  # now, where progress shows, not at the first look
                for fit in found:
                    len(fit.spectra)
            step(layer.name)
    store = open_store()
    statistics: dict[str, Statistics] = {}
    calibration = None
    # At their numerical ranks factors are exact: inputs could only bring rounding in.
    wanted = options.rank.kind != "exact" and "data" not in options.without
    if feeding is not None and feeding.calibration is not None and wanted:
        fitted = [layer for layer in prepared.layers if fits[layer.name]]
        taken = feeding.calibration.take(CALIBRATION_SAMPLES)
        calibration = Calibration(str(options.data), feeding.half, taken.digest())
        key = key_of(source.digest, calibration.digest, options.seed, prepared.input_shapes)
        with _kept_statistics(store, key, fitted) as statistics:
            missing = [layer for layer in fitted if layer.name not in statistics]
            statistics |= calibrate_on(prepared, missing, taken, options.seed, progress)
    jobs = Jobs(options.jobs, options.machine.threads)
    with workspace(out) as folder:
        factory = Factory(
            prepared,
            folder,
            out.name if out is not None else "model.onnx",
            statistics,
            calibration.digest if calibration is not None else "",
            jobs,
        )
        run = _Run(prepared, options, fits, kept, factory, session, feeding, store, progress)
        chosen, quality, speed = run.settle(run.choose())
        run.save_times()
        built = run.finish(chosen)
        if calibration is not None and factory.corrects:
            calibration = replace(calibration, sequential=run.sequential)
        outcome = run.outcome(chosen, quality, speed)
        plan = Plan(
            source.digest, outcome.decisions(), options.seed, calibration if chosen else None
        )
        if out is not None:
            place(built.path, out)
        model = onnx.load(built.path if out is None else out)
        label = None if out is None else str(out)
        seconds = time.perf_counter() - started
        report = outcome.report(plan, built, label, run.notes(plan, speed), seconds)
    return Result(model, plan, report)


def _open(
    source: Source, options: Options, progress: Progress
) -> tuple[Session | None, Feeding | None]:
    """The original in the runtime, with what it is run on; neither where nothing is run whole."""
    if options.verify == "none" or (options.verify == "layers" and options.data is None):
        check_graph(source)
        return None, None
    with progress.stage("open the model", None):
        session = open_source(source, options.machine)
        feeding = feed_model(
            source,
            session,
            data=options.data,
            validation=options.validation,
            labels=options.labels,
            shapes=options.shapes,
            batch=options.batch,
            seed=options.seed,
        )
    return session, feeding


@contextlib.contextmanager
def _kept_statistics(
    store: Store, key: str, layers: Sequence[Layer]
) -> Iterator[dict[str, Statistics]]:
    """Statistics that the store has of these layers; what is added is written back."""
    arrays = store.read_arrays("statistics", key)
    names = {layer.name for layer in layers}
    found = {
        name: Statistics(
            arrays[f"mean {name}"], arrays[f"covariance {name}"], int(arrays[f"rows {name}"])
        )
        for name in (n.removeprefix("mean ") for n in arrays if n.startswith("mean "))
        if name in names and f"covariance {name}" in arrays and f"rows {name}" in arrays
    }
    before = len(found)
    yield found
    if len(found) > before:
        for name, item in found.items():
            arrays[f"mean {name}"], arrays[f"covariance {name}"] = item.mean, item.covariance
            arrays[f"rows {name}"] = np.array(item.rows)
        store.write_arrays("statistics", key, arrays)


def calibrate_on(
    prepared: Prepared, layers: Sequence[Layer], samples: Samples, seed: int, progress: Progress
) -> dict[str, Statistics]:
    """Statistics of these layers; on one CPU thread, so that a replay has the same to the bit."""
    feeds = [feed for feed, _, _ in samples.batches()]
    return calibrate(prepared, layers, feeds, ONE_CPU_THREAD, seed, progress)


def choices_of(chosen: Mapping[str, Candidate]) -> dict[str, Choice]:
    """What replaces each layer, without what it costs."""
    return {name: item.choice for name, item in chosen.items()}


@dataclass
class _Run:
    """The stages that share what a run has found so far."""

    prepared: Prepared
    options: Options
    fits: Mapping[str, Sequence[Fit]]
    kept: dict[str, str]
    factory: Factory
    session: Session | None
    feeding: Feeding | None
    store: Store
    progress: Progress
    times: dict[tuple[str, Choice], LayerTime] = field(default_factory=dict)
    named: dict[str, Sequence[Candidate]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.judge: Judge | None = None
        self.weighing: Weighing | None = None
        self.table: LatencyTable | None = None
        self.sequential = 0  # samples of sequential correction
        self.improved: tuple[Mapping[str, Choice], Quality] | None = None
        if self.options.verify != "none":
            self.table = self._open_table()
        if self.options.verify == "full":
            assert self.session is not None
            assert self.feeding is not None
            with self.progress.stage("run the original", None):
                self.judge = Judge(self.session, self.feeding.judged, self.options.metric)

    def _open_table(self) -> LatencyTable:
        options = self.options
        if options.latency_table is None:
            return machine_table(options.machine, self.store, measures=options.measure)
        return named_table(options.machine, Path(options.latency_table), measures=options.measure)

    @property
    def timed(self) -> bool:
        """Whether the whole model is timed here: not for another machine."""
        return (
            self.options.measure
            and self.judge is not None
            and not (self.table is not None and self.table.foreign)
        )

    def save_times(self) -> None:
        """Write the latency table.

        Raises
        ------
        OutputError
            If the file that the user named for it can't be written.
        """
        if self.table is None:
            return
        try:
            self.table.save()
        except OSError as error:
            if (path := self.options.latency_table) is not None:
                raise OutputError(write_failure(Path(path), error)) from None

    def choose(self) -> Chosen:
        """The boldest candidates that the accuracy limit allows on the saved file."""
        if self.options.rank.kind == "auto" and self.judge is not None:
            self._weigh(self.judge)
            if self.options.fraction is not None:
                return self._meet(self.options.fraction)
            levels = [partial(self._allocated, damage) for damage in DAMAGES]
        else:
            levels = [partial(self._named)]
        with self.progress.stage("choose and verify", None) as step:

            def verdict(chosen: Mapping[str, Candidate]) -> str | None:
                step(f"trial of {len(chosen)} layers")
                return self._verdict(chosen)

            found = boldest(levels, Trials(verdict))
        self.kept |= found.refused
        return self._bolder(found.chosen)

    def _bolder(self, chosen: Chosen) -> Chosen:
        """Further levels of damage that only sequential correction brings within the limit."""
        if self.weighing is None or not self._sequence_samples(chosen):
            return chosen
        saved = sum(c.saved for c in chosen.values())
        tried = 0
        for damage in DAMAGES:
            more = self._allocated(damage)
            if sum(c.saved for c in more.values()) <= saved or more == chosen:
                continue
            if tried == _BOLDER or self._over(self._improved(more)) is not None:
                break
            tried, chosen, saved = tried + 1, more, sum(c.saved for c in more.values())
        return chosen

    def _sequence_samples(self, chosen: Chosen) -> int:
        """How many samples sequential correction looks at: as many as a minute allows."""
        samples = self.feeding.calibration if self.feeding is not None else None
        if samples is None or not self.factory.statistics or len(chosen) < 2:
            return 0
        if "sequential" in self.options.without:
            return 0
        if not self.sequential:
            assert self.session is not None
            feed, index, _ = next(iter(samples.batches()))
            self.session.run(feed)
            started = time.perf_counter()
            self.session.run(feed)
            each = (time.perf_counter() - started) / len(index)
            layers = len(self.factory.statistics)
            affordable = int(_SEQUENCE_SECONDS / max(2 * layers * each, 1e-9))
            self.sequential = min(SEQUENCE_SAMPLES, len(samples), affordable)
        return self.sequential if self.sequential >= _FEWEST_SAMPLES else 0

    def _improved(self, chosen: Chosen) -> Quality:
        """Judge a set, corrected in sequence where that helps on samples it wasn't fitted to."""
        assert self.judge is not None
        choices = choices_of(chosen)
        if self.factory.corrects and self.improved is not None and self.improved[0] == choices:
            return self.improved[1]
        self.factory.forget()
        own = self._judged(choices)
        count = self._sequence_samples(chosen)
        if not count or self.feeding is None or self.feeding.calibration is None:
            return own
        taken = self.feeding.calibration.take(CALIBRATION_SAMPLES).take(count)
        feeds = [feed for feed, _, _ in taken.batches()]
        seed = self.options.seed
        corrected = correct(self.prepared, choices, self.factory, feeds, seed, self.progress)
        self.factory.correct(choices, corrected)
        quality = self._judged(choices)
        fits = self._over(quality) is None or self._over(own) is not None
        if fits and quality.fidelity.rel_error < own.fidelity.rel_error:
            self.improved = (choices, quality)
            return quality
        self.factory.forget()
        return own

    def _judged(self, choices: Mapping[str, Choice]) -> Quality:
        assert self.judge is not None
        return self.judge.judge(self._open(self.factory.build(choices)))

    def _open(self, built: Built) -> Session:
        return Session(built.path, self.options.machine, "the optimized model")

    def _weigh(self, judge: Judge) -> None:
        """Weigh all candidates; sensitivities come from samples that don't judge the result."""
        assert self.session is not None
        assert self.feeding is not None
        assert self.table is not None
        options, probed = self.options, judge
        samples = self.feeding.calibration
        origin: list[object] = [self.prepared.source.digest, self.prepared.input_shapes]
        if samples is not None:
            taken = samples.take(PROBED_SAMPLES)
            origin += [samples.take(CALIBRATION_SAMPLES).digest(), taken.digest()]
            with self.progress.stage("run the original", None):
                probed = Judge(self.session, taken, "rel-error")
        passes = {f.graph_pass.name: None for fits in self.fits.values() for f in fits}
        self.weighing = Weighing(
            self.prepared,
            [layer for layer in self.prepared.layers if self.fits[layer.name]],
            self.factory.statistics,
            Aim(
                tuple(passes),
                options.goal,
                options.latency_vetoes,
                "sensitivity" not in options.without,
            ),
            probed,
            self.table,
            self.factory.jobs,
            self.store,
            key_of(*origin, options.seed, options.machine),
            self.progress,
        )
        self.weighing.weigh()
        self.times |= self.weighing.times
        self.kept |= self.weighing.reasons

    def _allocated(self, damage: float) -> Chosen:
        """The cheapest choice within a predicted damage."""
        weighing = self.weighing
        assert weighing is not None
        found = allocate(weighing.options, weighing.kept, most_damage=damage) or {}
        return {name: option.candidate for name, option in found.items()}

    def _meet(self, fraction: float) -> Chosen:
        """The least damaging choice within a budget, counted or measured on the saved file.

        Raises
        ------
        BudgetError
            If there is none, or it is outside the accuracy limit.
        """
        weighing, goal = self.weighing, self.options.goal
        assert weighing is not None
        assert self.judge is not None
        total = self._total(goal)
        others = total - sum(weighing.kept.values())
        budget = fraction * total - others
        least = others + sum(
            min((o.cost for o in weighing.options.get(name, ())), default=kept)
            for name, kept in weighing.kept.items()
        )
        asked = f"--target {goal}={fraction:g}"
        for _ in range(_CORRECTIONS):
            found = allocate(weighing.options, weighing.kept, most_cost=budget)
            if found is None:
                raise BudgetError(
                    f"{asked} can't be met: the boldest candidates leave {least / total:.0%} of "
                    f"the model's {goal}; allow more, or more methods"
                )
            chosen = {name: option.candidate for name, option in found.items()}
            with self.progress.stage(f"verify {len(chosen)} replaced layers", None):
                built = self.factory.build(choices_of(chosen))
                cost = self._cost(goal, total, built, chosen)
            if cost <= fraction * total * (1 + 1e-9):
                if (why := self._over(self._improved(chosen))) is not None:
                    raise BudgetError(f"{asked} is outside the accuracy allowed: {why}")
                return chosen
            budget -= cost - fraction * total  # names and nodes take their share too
        raise BudgetError(f"{asked} can't be met: {cost / total:.0%} is the nearest that was found")

    def _total(self, goal: str) -> float:
        """What the original costs as a whole."""
        if goal == "latency":
            if not self.timed:
                return self._estimated_total()
            assert self.session is not None
            assert self.feeding is not None
            return time_session(self.session, self.feeding.timed).median_ms
        if goal == "macs":
            return count_macs(self.prepared.model, self.prepared.shapes)
        source = self.prepared.source
        return source.nbytes if goal == "bytes" else count_params(source.model)

    def _estimated_total(self) -> float:
        """Milliseconds of all layers, those without candidates at a usual speed."""
        assert self.weighing is not None
        rest = [
            work.usual_ms
            for layer in self.prepared.layers
            if layer.name not in self.weighing.kept and (work := layer_work(layer)) is not None
        ]
        return sum(self.weighing.kept.values()) + sum(rest)

    def _cost(self, goal: str, total: float, built: Built, chosen: Chosen) -> float:
        """What a built model costs as a whole, where the original costs ``total``."""
        if goal == "latency":
            if not self.timed:
                return total - sum(self._saved_ms(n, c) or 0.0 for n, c in chosen.items())
            assert self.session is not None
            assert self.feeding is not None
            compared = compare_sessions(self.session, self._open(built), self.feeding.timed)
            return total / compared.speedup
        if goal == "macs":
            return total - saved_macs(self.prepared, chosen)
        return built.nbytes if goal == "bytes" else built.params

    def settle(self, chosen: Chosen) -> tuple[Chosen, Quality | None, Comparison | None]:
        """Measure the saved file once more; put back layers until it pays, or all of them."""
        if self.options.verify == "layers":
            return self._settle_alone(chosen)
        if self.judge is None or self.session is None or self.feeding is None:
            return chosen, None, None
        while chosen:
            quality = self._improved(chosen)
            built = self.factory.build(choices_of(chosen))
            speed = self._compare(built, len(chosen)) if self.timed else None
            why = self._too_large(built) or self._over(quality)
            if why is not None and self.options.fraction is not None:
                raise BudgetError(f"the budget can't be met: {why}")
            # What only makes the file smaller has to be no slower, the rest has to be faster.
            stored = any(isinstance(c.choice.graph_pass, WeightPass) for c in chosen.values())
            wanted = ("faster", "within noise") if stored else ("faster",)
            vetoed = speed is not None and self.options.latency_vetoes
            if why is None and vetoed and speed is not None and speed.verdict not in wanted:
                why = (
                    f"the whole model is {'slower' if stored else 'not measurably faster'} with it "
                    f"({speed.speedup:.2f}×, 95% {speed.low:.2f} to {speed.high:.2f})"
                )
            if why is None:
                return chosen, quality, speed
            ranked = sorted(chosen, key=lambda n: self._worth(n, chosen[n]))
            for name in ranked[len(ranked) // 2 :]:
                self.kept[name] = f"put back: {why}"
            chosen = {n: chosen[n] for n in ranked[: len(ranked) // 2]}
        with self.progress.stage("verify", None):
            quality = self.judge.judge(self.session)
            speed = None
            if self.timed:
                speed = compare_sessions(self.session, self.session, self.feeding.timed)
        return {}, quality, speed

    def _compare(self, built: Built, layers: int) -> Comparison:
        assert self.session is not None
        assert self.feeding is not None
        candidate = self._open(built)
        with self.progress.stage(f"verify {layers} replaced layers", None):
            speed = compare_sessions(self.session, candidate, self.feeding.timed)
        if speed.verdict == "within noise" and speed.speedup > 1:
            # Undecided, and promising: one look more, longer and by itself.
            with self.progress.stage("time it once more", None):
                speed = compare_sessions(
                    self.session, candidate, self.feeding.timed, 3 * latency.SECONDS
                )
        return speed

    def _settle_alone(self, chosen: Chosen) -> tuple[Chosen, Quality, None]:
        """Put back every layer that alone is outside the limit."""
        feeds = []
        if self.feeding is not None and isinstance(self.feeding.judged, Samples):
            judged = self.feeding.judged.take(_CHECKED_FEEDS * self.feeding.judged.batch)
            feeds = [feed for feed, _, _ in judged.batches()]
        found = check_layers(
            self.prepared,
            choices_of(chosen),
            self.factory,
            feeds,
            self.options.seed,
            self.progress,
        )
        passed = {}
        for name, quality in found.items():
            if (why := self._over(quality)) is None:
                passed[name] = quality
            else:
                self.kept[name] = f"put back: {why}"
        return {name: chosen[name] for name in passed}, worst(passed), None

    def finish(self, chosen: Chosen) -> Built:
        """The file to hand over: the one that was verified, or the original."""
        if not chosen:
            source = self.prepared.source
            path, nbytes = copy_source(source, self.factory.folder, self.factory.file_name)
            return Built(path, nbytes, count_params(source.model))
        built = self.factory.build(choices_of(chosen))
        if self.judge is None:
            check_graph(load(built.path))
        return built

    def outcome(self, chosen: Chosen, quality: Quality | None, speed: Comparison | None) -> Outcome:
        """All that is to be told."""
        return Outcome(
            self.prepared,
            self.options,
            self.fits,
            self.factory,
            self.weighing,
            chosen,
            self.kept,
            self.named,
            self.times,
            quality,
            speed,
            self._judged_on(),
        )

    def _judged_on(self) -> str:
        if self.options.verify == "layers":
            drawn = "inputs drawn at random" if self.feeding is None else self.feeding.words
            return f"each replaced layer alone, on {drawn}; the model wasn't judged as a whole"
        if self.feeding is None:
            return "not run (--verify none): only the graph was checked"
        return f"the saved file, in full, on {self.feeding.words}"

    def notes(self, plan: Plan, speed: Comparison | None) -> list[str]:
        """What the user should know besides."""
        notes = []
        if speed is not None and plan.replaced and speed.verdict == "slower":
            notes.append(
                f"slower than the original ({speed.speedup:.2f}×): the ranks or the target were "
                "named, so that latency vetoed nothing; --target latency puts such layers back"
            )
        if self.factory.corrects:
            notes.append(
                f"factors were corrected in sequence, each layer behind those before it, on "
                f"{self.sequential} samples"
            )
        if self.guarded:
            notes.append(
                "arg-max agreement says little on these inputs (synthetic, or all of one class): "
                "the outputs' rel-error was held to --max-drop too"
            )
        if self.judge is not None and not self.timed:
            notes.append(
                "nothing was timed: latencies come from "
                + (
                    "the named table, which is another machine's"
                    if self.table is not None and self.table.foreign
                    else "known tables, or are estimated from the work"
                )
            )
        if self.table is not None and self.table.estimated:
            notes.append(
                f"{self.table.estimated} latencies were in no table: they were estimated from "
                "multiply-accumulates, elements moved and operators started"
            )
        if self.options.without:
            notes.append(f"left out on request: {', '.join(self.options.without)}")
        return notes

    def _named(self) -> Chosen:
        """The set of replacements at the named ranks, or at a cautious error where nothing runs."""
        sized = self.options.target in ("params", "bytes") or self.options.expand_at_load
        goal: Goal = "params" if sized else "macs"
        chosen: Chosen = {}
        for layer in self.prepared.layers:
            fits = self.fits[layer.name]
            if not fits:
                continue
            found = (
                auto_candidates(layer, fits, self._cautious_error(), goal)
                if self.options.rank.kind == "auto"
                else named_candidates(layer, fits, self.options.rank, goal)
            )
            if isinstance(found, list):
                self.named[layer.name] = found
            if isinstance(found, list) and self.options.target == "macs":
                fewer = [c for c in found if (c.macs or 0) <= (layer.macs or 0)]
                found = fewer or "a lookup has no MACs, its replacement would add some"
            if isinstance(found, list) and self.options.latency_vetoes:
                found = self._fastest(layer, found)
            if isinstance(found, str):
                self.kept[layer.name] = found
            else:
                chosen[layer.name] = found[0]
        return chosen

    def _cautious_error(self) -> float:
        """Of a weight, where the whole model isn't judged."""
        if self.options.verify == "layers":
            return min(max(self.options.max_drop, 1e-6), _BOLDEST_ERROR)
        return UNVERIFIED_AUTO_ERROR

    def _fastest(self, layer: Layer, found: Sequence[Candidate]) -> list[Candidate] | str:
        """The candidates that are measurably faster than the layer alone, fastest first.

        Those that only store factors come after them: nothing about them is faster.
        """
        assert self.table is not None
        paying: list[tuple[float, Candidate]] = []
        slow = []
        stored = [c for c in found if isinstance(c.choice.graph_pass, WeightPass)]
        for item in [c for c in found if c not in stored][:_TIMED_METHODS]:
            timed = self.table.time(self.prepared.model, layer, item.choice)
            if timed is None:
                paying.append((0.0, item))  # the whole model's timing will tell
                continue
            self.times[layer.name, item.choice] = timed
            if timed.faster:
                paying.append((-timed.saved_ms, item))
            else:
                slow.append(timed.refusal(item.choice))
        paying.sort(key=lambda pair: pair[0])
        return [item for _, item in paying] + stored or "; ".join(slow)

    def _verdict(self, chosen: Mapping[str, Candidate]) -> str | None:
        try:
            too_large = self._too_large(self.factory.build(choices_of(chosen)))
            if too_large is not None or self.judge is None:
                return too_large
            quality = self._judged(choices_of(chosen))
        except ModelError as error:
            return str(error)
        return self._over(quality)

    def _too_large(self, built: Built) -> str | None:
        limit = self.prepared.source.nbytes
        if built.nbytes <= limit:
            return None
        return f"the file would grow from {limit:,} to {built.nbytes:,} bytes"

    def _over(self, quality: Quality) -> str | None:
        limit = self.options.max_drop
        if not math.isfinite(quality.fidelity.rel_error):
            return "an output would differ in shape or in where it is finite"
        # The tolerance is for the last bit of a difference of two shares, no more.
        if quality.drop > limit + 1e-12:
            direction = "rise to" if quality.metric == "rel-error" else "drop by"
            return f"{quality.metric} would {direction} {quality.drop:.4g}, the limit is {limit:g}"
        if self.guarded and quality.fidelity.rel_error > limit:
            return (
                f"rel-error would rise to {quality.fidelity.rel_error:.4g}, the limit is {limit:g} "
                "(agreement alone says little here)"
            )
        return None

    @property
    def guarded(self) -> bool:
        """Whether the outputs themselves are held to the limit: the default metric is blind."""
        judge = self.judge
        return (
            judge is not None
            and self.options.metric is None
            and judge.metric == "agreement"
            and judge.agreement_is_blind
        )

    def _worth(self, name: str, item: Candidate) -> tuple[bool, float]:
        """Sort key of what a replacement saves: measured milliseconds first, then counted work."""
        saved = self._saved_ms(name, item)
        return (True, -item.saved) if saved is None else (False, -saved)

    def _saved_ms(self, name: str, item: Candidate) -> float | None:
        timed = self.times.get((name, item.choice))
        return None if timed is None else timed.saved_ms
