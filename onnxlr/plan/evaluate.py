"""What a set of replacements comes to: built, corrected, judged on the saved file, and timed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from onnxlr.calibrate.budget import calibration_samples, sample_seconds
from onnxlr.errors import CrashError, ModelError
from onnxlr.limits import Limits
from onnxlr.methods.choice import Choice
from onnxlr.model.graph import all_graphs
from onnxlr.options import Options
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.prepared import Prepared
from onnxlr.progress import Progress, Silent
from onnxlr.rewrite.builder import Builder, Built
from onnxlr.rewrite.factorizer import Factorizer
from onnxlr.rewrite.sequential import correct
from onnxlr.rewrite.variant import Variant
from onnxlr.system.session import Session
from onnxlr.system.trial import Trial
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency import Comparison, compare_sessions, time_session

_NODE_SECONDS = 2.5e-4  # that a node takes while a model is put together, saved and opened
_TIMED_ONCE_MORE = 3  # times as long, where a comparison is undecided


@dataclass(frozen=True)
class Evaluation:
    """A variant with its quality, measured on the saved file."""

    variant: Variant
    quality: Quality


@dataclass(frozen=True)
class Evaluator:
    """Builds, judges and times variants on the user's samples, against the user's limits.

    Attributes
    ----------
    prepared : Prepared
    options : Options
    factorizer : Factorizer
    builder : Builder
    session, feeding : Session and Feeding, or None
        The original in the runtime and what it is run on; None where nothing is run whole.
    judge : Judge or None
        None where the model isn't judged as a whole.
    timed : bool
        Whether whole models are timed: not for another machine.
    progress : Progress
    """

    prepared: Prepared
    options: Options
    factorizer: Factorizer
    builder: Builder
    session: Session | None
    feeding: Feeding | None
    judge: Judge | None
    timed: bool
    progress: Progress
    _judgements: list[Quality] = field(default_factory=list)
    _tried: list[Built] = field(default_factory=list)  # the latest that ran in the child process

    @property
    def limits(self) -> Limits:
        """How much effort the run makes."""
        return self.options.limits

    @property
    def judgements(self) -> int:
        """How many files were built, saved and judged so far."""
        return len(self._judgements)

    def evaluate(self, variant: Variant) -> Evaluation:
        """Build, save and judge a variant.

        Raises
        ------
        ModelError
            If the runtime refuses it, or goes down with it.
        """
        assert self.judge is not None
        quality = self.judge.judge(self._open(self.builder.build(variant)))
        self._judgements.append(quality)
        return Evaluation(variant, quality)

    def improved(self, choices: Mapping[str, Choice]) -> Evaluation:
        """The better of two variants of these choices: as fitted, or corrected in sequence.

        Corrected factors are taken where they help on samples that they weren't fitted to, and
        don't lead out of the limit.
        """
        plain = self.evaluate(self.factorizer.variant(choices))
        if not self.can_correct(choices):
            return plain
        samples = self.correction_samples
        try:
            corrected = self.evaluate(self._corrected(plain.variant, samples, self.progress))
        except CrashError:
            return plain
        fits = (
            self.why_outside_limit(corrected.quality) is None
            or self.why_outside_limit(plain.quality) is not None
        )
        closer = corrected.quality.fidelity.rel_error < plain.quality.fidelity.rel_error
        return corrected if fits and closer else plain

    def damage(self, choices: Mapping[str, Choice], samples: int) -> float:
        """What the metric loses and what the outputs do, together.

        The metric is what counts; on few samples it moves in steps, and how far the outputs get
        tells such sets apart. With ``samples``, the set is corrected in sequence on as many.
        """
        try:
            variant = self.factorizer.variant(choices)
            if samples:
                variant = self._corrected(variant, samples, Silent(), glance=True)
            quality = self.evaluate(variant).quality
        except ModelError:
            return math.inf
        damage = quality.drop + (
            quality.fidelity.divergence or 0.0 if self.by_classes else quality.fidelity.rel_error
        )
        return damage if math.isfinite(damage) else math.inf

    def _corrected(
        self, plain: Variant, samples: int, progress: Progress, *, glance: bool = False
    ) -> Variant:
        assert self.feeding is not None
        assert self.feeding.calibration is not None
        fitted = calibration_samples(self.prepared, self.feeding.calibration, self.limits)
        corrected = correct(
            self.prepared,
            plain,
            self.factorizer.statistics,
            fitted.take(samples),
            self.options.seed,
            progress,
            glance=glance,
        )
        return replace(corrected, sequential=samples)

    def can_correct(self, choices: Mapping[str, Choice]) -> bool:
        """Whether sequential correction is tried on a set."""
        return len(choices) > 1 and self.correction_samples > 0

    @cached_property
    def correction_samples(self) -> int:
        """How many samples sequential correction has time for; 0 where it isn't tried."""
        samples = self.feeding.calibration if self.feeding is not None else None
        if samples is None or not self._may_correct or self.too_many_layers:
            return 0
        affordable = int(self.limits.sequence_seconds / self._running_seconds)
        count = min(self.limits.sequence_samples, len(samples), affordable)
        return count if count >= self.limits.sequence_samples_least else 0

    @cached_property
    def too_many_layers(self) -> bool:
        """Whether sequential correction is left out because of the number of layers."""
        return self._may_correct and self._building_seconds > self.limits.building_seconds

    @property
    def _may_correct(self) -> bool:
        return bool(self.factorizer.statistics) and "sequential" not in self.options.without

    def correction_seconds(self, samples: int) -> float:
        """Seconds that correcting on so many samples takes, by the work in it."""
        return self._building_seconds + samples * self._running_seconds

    @property
    def _running_seconds(self) -> float:
        """Seconds of one sample, through the original and the model so far, for every layer."""
        return 2 * len(self.factorizer.statistics) * sample_seconds(self.prepared)

    @property
    def _building_seconds(self) -> float:
        """Seconds of building the model so far for every layer: they grow with their square."""
        nodes = sum(len(graph) for graph in all_graphs(self.prepared.model))
        return len(self.factorizer.statistics) * nodes * _NODE_SECONDS

    def original_ms(self) -> float:
        """Median milliseconds of the original."""
        assert self.session is not None
        assert self.feeding is not None
        return time_session(self.session, self.feeding.first_feed, self.limits).median_ms

    def compare(self, built: Built | None) -> Comparison:
        """The original and a built model in turn; without one the original beside itself."""
        assert self.session is not None
        assert self.feeding is not None
        feed, limits = self.feeding.first_feed, self.limits
        candidate = self.session if built is None else self._open(built)
        speed = compare_sessions(self.session, candidate, feed, limits)
        if built is not None and speed.verdict == "within noise" and speed.speedup > 1:
            longer = replace(limits, timing_seconds=_TIMED_ONCE_MORE * limits.timing_seconds)
            with self.progress.stage("time it once more", None):
                return compare_sessions(self.session, candidate, feed, longer)
        return speed

    def _open(self, built: Built) -> Session:
        """A built model in the runtime, once it has been seen to run in the child process."""
        machine, label = self.options.machine, "the optimized model"
        if self.feeding is not None and not any(built is tried for tried in self._tried):
            with Trial(built.path, machine, label, built.nbytes) as trial:
                trial.run(self.feeding.first_feed)
            self._tried[:] = [built]
        return Session(built.path, machine, label)

    def too_large(self, built: Built) -> str | None:
        """Why a file is larger than allowed, which is as large as the original."""
        limit = self.prepared.source.nbytes
        if built.nbytes <= limit:
            return None
        return f"the file would grow from {limit:,} to {built.nbytes:,} bytes"

    def why_outside_limit(self, quality: Quality) -> str | None:
        """Why a quality is outside the limit; None if it is within."""
        limit = self.options.max_drop
        if self.judge is not None and self.judge.sees_nothing:
            return "the original gives nothing but NaN and infinities on the inputs that judge"
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
    def by_classes(self) -> bool:
        """Whether class probabilities count, not the outputs' numbers: what a metric looks at."""
        judge = self.judge
        return (
            judge is not None
            and judge.has_class_vector
            and judge.metric in ("top1", "agreement")
            and not self.guarded
        )

    @property
    def guarded(self) -> bool:
        """Whether the outputs themselves are held to the limit: the default metric is blind."""
        judge = self.judge
        return judge is not None and self.options.metric is None and judge.default_is_blind
