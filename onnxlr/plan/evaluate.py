"""What a set of replacements comes to: built, corrected, judged on the saved file, and timed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnxlr.calibrate.budget import MOST_SAMPLES, calibration_samples, sample_seconds
from onnxlr.errors import CrashError, ModelError
from onnxlr.methods.choice import Choice
from onnxlr.model.graph import all_graphs
from onnxlr.options import Options
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.prepared import Prepared
from onnxlr.progress import Progress, Silent
from onnxlr.rewrite.builder import Built, Factory
from onnxlr.rewrite.sequential import correct
from onnxlr.system.sandbox import Trial
from onnxlr.system.session import Session
from onnxlr.verify import latency
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency import Comparison, compare_sessions, time_session

_SEQUENCE_SECONDS = 120.0
_BUILDING_SECONDS = 600.0
_NODE_SECONDS = 2.5e-4  # that a node takes while a model is put together, saved and opened
_FEWEST_SAMPLES = 32


@dataclass
class Assessor:
    """Assesses sets of replacements on what the user gave, within what the user allows.

    Attributes
    ----------
    session, feeding : or None
        None where the model isn't run as a whole.
    judge : Judge or None
        None where it isn't judged as a whole.
    timed : bool
        Whether whole models are timed: not for another machine.
    samples : int
        Of sequential correction, once it was asked for.
    too_many : bool
        Whether there are more layers than it has time for.
    judgements : int
        How many files were built, saved and judged so far.
    """

    prepared: Prepared
    options: Options
    factory: Factory
    session: Session | None
    feeding: Feeding | None
    judge: Judge | None
    timed: bool
    progress: Progress
    samples: int = 0
    too_many: bool = False
    judgements: int = 0
    _improved: tuple[Mapping[str, Choice], Quality] | None = None
    _tried: Built | None = None

    def improved(self, choices: Mapping[str, Choice]) -> Quality:
        """Judge a set, corrected in sequence where that helps on samples it wasn't fitted to."""
        if self.factory.corrects and self._improved is not None and self._improved[0] == choices:
            return self._improved[1]
        self.factory.forget()
        own = self.judged(choices)
        if not self.corrects(choices):
            return own
        try:
            quality = self._corrected(choices, self.samples, self.progress, glance=False)
        except CrashError:
            self.factory.forget()
            return own
        fits = self.over(quality) is None or self.over(own) is not None
        if fits and quality.fidelity.rel_error < own.fidelity.rel_error:
            self._improved = (dict(choices), quality)
            return quality
        self.factory.forget()
        return own

    def _corrected(
        self, choices: Mapping[str, Choice], samples: int, progress: Progress, *, glance: bool
    ) -> Quality:
        """The quality of a set that was corrected in sequence; the factory goes on building it."""
        assert self.feeding is not None
        assert self.feeding.calibration is not None
        taken = calibration_samples(self.prepared, self.feeding.calibration).take(samples)
        feeds = [feed for feed, _, _ in taken.batches()]
        seed = self.options.seed
        corrected = correct(
            self.prepared, choices, self.factory, feeds, seed, progress, glance=glance
        )
        self.factory.correct(choices, corrected)
        return self.judged(choices)

    def damage(self, choices: Mapping[str, Choice], samples: int) -> float:
        """What the metric loses and what the outputs do, together.

        The metric is what counts; on few samples it moves in steps, and how far the outputs get
        tells such sets apart. With ``samples``, the set is corrected in sequence on as many.
        """
        self.factory.forget()
        try:
            quality = (
                self._corrected(choices, samples, Silent(), glance=True)
                if samples
                else self.judged(choices)
            )
        except ModelError:
            return math.inf
        finally:
            self.factory.forget()
        found = quality.drop + (
            quality.fidelity.divergence or 0.0 if self.by_classes else quality.fidelity.rel_error
        )
        return found if math.isfinite(found) else math.inf

    def corrects(self, choices: Mapping[str, Choice]) -> bool:
        """Whether sequential correction is tried: on as many samples as there is time for."""
        samples = self.feeding.calibration if self.feeding is not None else None
        if samples is None or not self.factory.statistics or len(choices) < 2:
            return False
        if "sequential" in self.options.without:
            return False
        affordable = int(_SEQUENCE_SECONDS / self._running_seconds)
        self.samples = min(MOST_SAMPLES, len(samples), affordable)
        self.too_many = self._building_seconds > _BUILDING_SECONDS
        return self.samples >= _FEWEST_SAMPLES and not self.too_many

    def correction_seconds(self, samples: int) -> float:
        """What correcting on so many samples takes, by the work in it."""
        return self._building_seconds + samples * self._running_seconds

    @property
    def _running_seconds(self) -> float:
        """Of one sample, through the original and the model so far, for every layer."""
        return 2 * len(self.factory.statistics) * sample_seconds(self.prepared)

    @property
    def _building_seconds(self) -> float:
        """Of the model so far, for every layer: it grows with their square."""
        nodes = sum(len(graph) for graph in all_graphs(self.prepared.model))
        return len(self.factory.statistics) * nodes * _NODE_SECONDS

    def judged(self, choices: Mapping[str, Choice]) -> Quality:
        """The metric and the fidelity of the saved file."""
        self.judgements += 1
        assert self.judge is not None
        return self.judge.judge(self._open(self.factory.build(choices)))

    def original_ms(self) -> float:
        """Median milliseconds of the original."""
        assert self.session is not None
        assert self.feeding is not None
        return time_session(self.session, self.feeding.first_feed).median_ms

    def compare(self, built: Built | None) -> Comparison:
        """The original and a built model in turn; without one the original beside itself."""
        assert self.session is not None
        assert self.feeding is not None
        feed = self.feeding.first_feed
        candidate = self.session if built is None else self._open(built)
        speed = compare_sessions(self.session, candidate, feed)
        if built is not None and speed.verdict == "within noise" and speed.speedup > 1:
            # Undecided, and promising: one look more, longer and by itself.
            with self.progress.stage("time it once more", None):
                return compare_sessions(self.session, candidate, feed, 3 * latency.SECONDS)
        return speed

    def _open(self, built: Built) -> Session:
        """A built model in the runtime, once it has been seen to run in the child process."""
        if self._tried is not built and self.feeding is not None:
            with Trial(
                built.path, self.options.machine, "the optimized model", built.nbytes
            ) as trial:
                trial.run(self.feeding.first_feed)
            self._tried = built
        return Session(built.path, self.options.machine, "the optimized model")

    def too_large(self, built: Built) -> str | None:
        """Why a file is larger than allowed, which is as large as the original."""
        limit = self.prepared.source.nbytes
        if built.nbytes <= limit:
            return None
        return f"the file would grow from {limit:,} to {built.nbytes:,} bytes"

    def over(self, quality: Quality) -> str | None:
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
