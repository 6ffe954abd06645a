"""Evaluates sets of replacements: built, corrected, judged on the saved file, and timed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from onnxlr.calibrate.budget import (
    calibration_samples,
    correcting_seconds,
    probed_samples,
    samples_for_regression,
)
from onnxlr.calibrate.calibration import Calibration
from onnxlr.errors import CrashError, ModelError
from onnxlr.limits import Limits
from onnxlr.methods.choice import Choice
from onnxlr.model.graph import all_graphs
from onnxlr.options import Options
from onnxlr.plan.judged import Evaluation, Judged
from onnxlr.plan.verdicts import Verdicts
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.opening import open_session
from onnxlr.prepare.originals import Originals
from onnxlr.prepare.prefix import most_samples
from onnxlr.prepare.prepared import Prepared
from onnxlr.progress import Progress, Silent
from onnxlr.rewrite.builder import Builder, Built
from onnxlr.rewrite.factorizer import Factorizer
from onnxlr.rewrite.finish import Finish
from onnxlr.rewrite.sequential import correct
from onnxlr.rewrite.variant import Key, Variant
from onnxlr.system.session import Machine, Session
from onnxlr.system.time_limit import TimeLimit
from onnxlr.system.trial import Trial
from onnxlr.verify.defaults import layer_limit
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency import Comparison, compare_sessions, time_session
from onnxlr.verify.promise import Promise
from onnxlr.widths.narrowing import Narrowing

_LAYER_SECONDS = 0.3  # that a layer takes to be corrected, beside the runs
_NODE_SECONDS = 2.5e-4  # that a node takes while a model is put together, saved and opened


@dataclass(frozen=True)
class Evaluator:
    """Builds, judges and times variants on the user's samples, against the user's limits.

    Attributes
    ----------
    prepared : Prepared
        The model whose layers are replaced: the original, or one with fewer channels.
    options : Options
    factorizer : Factorizer
    builder : Builder
    session, feeding : Session and Feeding, or None
        The original in the runtime and what it is run on; None where nothing is run whole.
    judge : Judge or None
        Of the samples that choose; None where the model isn't judged as a whole.
    calibration : Calibration or None
        The samples that factors are fitted to; None where they are fitted to the weights alone.
    promise : Promise or None
        What has to be shown of the loss in the end, on other samples; None without a judge.
    time : TimeLimit
    timed : bool
        Whether whole models are timed: not for another machine.
    progress : Progress
    finish : Finish or None
        What is done to the file afterwards: models are judged and timed with that.
    """

    prepared: Prepared
    options: Options
    factorizer: Factorizer
    builder: Builder
    session: Session | None
    feeding: Feeding | None
    judge: Judge | None
    calibration: Calibration | None
    promise: Promise | None
    time: TimeLimit
    timed: bool
    progress: Progress
    finish: Finish | None = None
    _judged: list[Judged] = field(default_factory=list)
    _speeds: dict[Key, Comparison] = field(default_factory=dict)
    _tried: list[Built] = field(default_factory=list)  # the latest that ran in the child process

    @property
    def limits(self) -> Limits:
        """How much effort the run makes."""
        return self.options.limits

    @property
    def judged(self) -> tuple[Judged, ...]:
        """All that was built, saved and judged so far."""
        return tuple(self._judged)

    @property
    def narrowing(self) -> Narrowing | None:
        """The model with fewer channels whose layers are replaced; None for the original."""
        return self.factorizer.narrowing

    @property
    def original(self) -> Prepared:
        """The model as it was, with all of its channels."""
        return self.builder.prepared

    def speed_of(self, variant: Variant | Judged) -> Comparison | None:
        """How a variant compared with the original; None where it wasn't timed."""
        return self._speeds.get(variant.key)

    @property
    def speeds(self) -> tuple[Comparison, ...]:
        """How all variants that were timed compared with the original."""
        return tuple(speed for key, speed in self._speeds.items() if key[0] or key[2] is not None)

    def evaluate(self, variant: Variant) -> Evaluation:
        """Build, save and judge a variant.

        Raises
        ------
        ModelError
            If the runtime refuses it, or goes down with it.
        """
        assert self.judge is not None
        for item in self._judged:
            if item.key == variant.key:  # its bytes are the same
                return Evaluation(variant, item.quality, item.nbytes)
        built = self.builder.build(variant)
        quality = self.judge.judge(self.open(built, self.judge.machine), variant.key)
        nbytes = self.finished(built).nbytes
        row = variant.choices, variant.sequential, quality, nbytes, variant.narrowing
        self._judged.append(Judged(*row, self.calibration))
        return Evaluation(variant, quality, nbytes)

    def variant(self, choices: Mapping[str, Choice], sequential: int) -> Variant:
        """The variant of some choices, corrected in sequence on so many samples."""
        plain = self.factorizer.variant(choices)
        if not sequential or len(choices) < 2:
            return plain
        return self._corrected(plain, sequential, self.progress)

    def improved(self, choices: Mapping[str, Choice]) -> Evaluation:
        """The better of two variants of these choices: as fitted, or corrected in sequence.

        Corrected factors are taken where they help on samples that they weren't fitted to, and
        don't lead out of the limit.
        """
        plain = self.evaluate(self.factorizer.variant(choices))
        if not self.can_correct(choices) or not self.time.allows(0.6, "sequential correction"):
            return plain
        samples = self.correction_samples
        try:
            corrected = self.evaluate(self._corrected(plain.variant, samples, self.progress))
        except CrashError:
            return plain
        fits = (
            self.verdicts.why_ruled_out(corrected.quality) is None
            or self.verdicts.why_ruled_out(plain.quality) is not None
        )
        closer = corrected.quality.fidelity.rel_error < plain.quality.fidelity.rel_error
        return corrected if fits and closer else plain

    def damage(self, choices: Mapping[str, Choice], samples: int) -> float:
        """What a set does to the model (``Verdicts.damage``); infinite where it can't be run.

        With ``samples``, the set is corrected in sequence on as many.
        """
        try:
            variant = self.factorizer.variant(choices)
            if samples:
                variant = self._corrected(variant, samples, Silent(), glance=True)
            quality = self.evaluate(variant).quality
        except ModelError:
            return math.inf
        damage = self.verdicts.damage(quality)
        return damage if math.isfinite(damage) else math.inf

    def _corrected(
        self, plain: Variant, samples: int, progress: Progress, *, glance: bool = False
    ) -> Variant:
        assert self.feeding is not None
        assert self.feeding.fit is not None
        fitted = calibration_samples(self.original, self.feeding.fit, self.limits)
        corrected = correct(
            self.prepared,
            plain,
            self.factorizer.statistics,
            fitted.take(samples),
            self.options.seed,
            progress,
            self._originals,
            glance=glance,
            processes=self.factorizer.pool.count,
        )
        return replace(corrected, sequential=samples)

    @cached_property
    def _originals(self) -> Originals:
        return Originals(self.prepared)

    def can_correct(self, choices: Mapping[str, Choice]) -> bool:
        """Whether sequential correction is tried on a set."""
        return len(choices) > 1 and self.correction_samples > 0

    @cached_property
    def correction_samples(self) -> int:
        """How many samples sequential correction has time for; 0 where it isn't tried."""
        samples = self.feeding.fit if self.feeding is not None else None
        if samples is None or not self._may_correct or self.too_many_layers:
            return 0
        limits, layers = self.limits, self.factorizer.statistics
        affordable = int(limits.sequence_seconds / correcting_seconds(self.prepared))
        enough = samples_for_regression(self.prepared, layers, limits.sequence_rows)
        most = min(limits.sequence_samples, max(limits.sequence_samples_enough, enough))
        count = min(most, len(samples), affordable, most_samples(self.prepared, layers))
        return count if count >= limits.sequence_samples_least else 0

    @cached_property
    def too_many_layers(self) -> bool:
        """Whether sequential correction is left out because of the number of layers."""
        return self._may_correct and self._building_seconds > self.limits.building_seconds

    @property
    def _may_correct(self) -> bool:
        return bool(self.factorizer.statistics) and "sequential" not in self.options.without

    def correction_seconds(self, samples: int, layers: int | None = None) -> float:
        """Seconds that correcting so many layers, or all, on so many samples takes.

        They are estimated from the work.
        """
        seconds = self._building_seconds + samples * correcting_seconds(self.prepared)
        return seconds if layers is None else seconds * layers / len(self.factorizer.statistics)

    @property
    def _building_seconds(self) -> float:
        """Seconds of building the model so far for every layer, and of fitting the layer."""
        nodes = sum(len(graph) for graph in all_graphs(self.prepared.model))
        return len(self.factorizer.statistics) * (_LAYER_SECONDS + nodes * _NODE_SECONDS)

    def base_session(self) -> Session:
        """The model whose layers are replaced, in the runtime."""
        assert self.session is not None
        if self.narrowing is None:
            return self.session
        return open_session(self.prepared.source, self.options.machine)

    @cached_property
    def probing(self) -> Judge:
        """Who measures sensitivities: on samples that don't judge the result, if there are some."""
        assert self.judge is not None
        if self.feeding is None or self.feeding.fit is None:
            return self.judge
        with self.progress.stage("run the original", None):
            probed = probed_samples(self.prepared, self.feeding.fit, self.limits)
            return Judge(self.base_session(), probed, "rel-error")

    @property
    def rival(self) -> Session | None:
        """What speed is compared with: the original after the step of ``--behind``."""
        return self.session if self.finish is None else self.finish.session

    @cached_property
    def behind_alone(self) -> Quality | None:
        """The quality of the original after the step of ``--behind``, on the samples that choose.

        None where nothing is done: then it loses nothing.
        """
        if self.finish is None or self.judge is None:
            return None
        return self.judge.judge(self.finish.session)

    @property
    def why_hopeless(self) -> str | None:
        """Why nothing can be within the limit: the step of ``--behind`` alone is outside of it."""
        if self.finish is None or self.behind_alone is None:
            return None
        why = self.verdicts.why_ruled_out(self.behind_alone)
        return None if why is None else f"{self.finish.name} alone is outside the limit: {why}"

    def original_ms(self) -> float:
        """Median milliseconds of the original after the step of ``--behind``."""
        assert self.rival is not None
        assert self.feeding is not None
        return time_session(self.rival, self.feeding.first_feed, self.limits).median_ms

    def compare(self, variant: Variant) -> Comparison:
        """The original and the file of a variant timed in turn, both after ``--behind``, once."""
        if variant.key not in self._speeds:
            assert self.rival is not None
            assert self.feeding is not None
            candidate, feed = self.open_variant(variant), self.feeding.first_feed
            self._speeds[variant.key] = compare_sessions(self.rival, candidate, feed, self.limits)
        return self._speeds[variant.key]

    def open_variant(self, variant: Variant) -> Session:
        """The model of a variant, or the original where that changes nothing, in the runtime.

        It is after the step of ``--behind``.
        """
        if variant.changes_anything:
            return self.open(self.builder.build(variant))
        assert self.rival is not None
        return self.rival

    def finished(self, built: Built) -> Built:
        """The file that is judged and timed: a built model after the step of ``--behind``.

        Raises
        ------
        ModelError
            If that can't be done.
        """
        return built if self.finish is None else self.finish.finisher.finish(built)

    def open(self, built: Built, machine: Machine | None = None) -> Session:
        """A built model after the step of ``--behind``, in the runtime that times or judges it.

        Parameters
        ----------
        built : Built
        machine : Machine, optional
            Where a judge runs models; by default where they are timed.
        """
        return self.open_as_is(self.finished(built), machine)

    def open_as_is(self, built: Built, machine: Machine | None = None) -> Session:
        """A file in the runtime, once it has been seen to run in the child process."""
        timed, label = self.options.machine, "the optimized model"
        if self.feeding is not None and not any(built is tried for tried in self._tried):
            with Trial(built.path, timed, label, built.nbytes) as trial:
                trial.run(self.feeding.first_feed)
            self._tried[:] = [built]
        return Session(built.path, machine or timed, label)

    @cached_property
    def verdicts(self) -> Verdicts:
        """What is said of a quality."""
        limit = layer_limit(self.options.max_drop) if self.promise is None else self.promise.limit
        if (finish := self.finish) is None:
            return Verdicts(self.judge, self.promise, limit, self.original.source.nbytes)
        most, file = finish.original.nbytes, f"the file that {finish.name} makes"
        return Verdicts(self.judge, self.promise, limit, most, file)
