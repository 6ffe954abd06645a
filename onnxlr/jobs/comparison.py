"""Models measured as they are, one or two beside each other: what ``compare`` and ``bench`` do."""

from collections.abc import Sequence
from dataclasses import dataclass

from onnxlr.errors import UsageError
from onnxlr.layers.macs import count_macs
from onnxlr.limits import Limits
from onnxlr.model.constants import count_params
from onnxlr.model.load import Model, Source, load
from onnxlr.prepare.feeding import open_with_feeding
from onnxlr.prepare.opening import open_after_trial, opening_words
from onnxlr.prepare.prepared import prepare, simplified_model
from onnxlr.progress import Progress
from onnxlr.report.report import Size
from onnxlr.system.in_memory import Data
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.verify.defaults import MetricChoice
from onnxlr.verify.endings import endings
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency import Comparison, Timing, compare_sessions, time_session
from onnxlr.verify.promise import compared


@dataclass(frozen=True)
class Bounds:
    """What the second of two models may be worse by; None where anything is allowed.

    Attributes
    ----------
    max_drop : float or None
        Loss of the metric.
    max_slowdown : float or None
        Share of the first model's time that the second may take more: 0.05 is 5%.
    """

    max_drop: float | None = None
    max_slowdown: float | None = None


@dataclass(frozen=True)
class ModelComparison:
    """Two models side by side: their sizes, the quality of B against A, and their speed.

    Attributes
    ----------
    a, b : Size
    metric : MetricChoice
        What judged, and why.
    quality : Quality
    speed : Comparison
    machine : Machine
    batch : int
        Number of samples in the batch that was timed.
    fed : str
        What both were run on, in words.
    bounds : Bounds
    """

    a: Size
    b: Size
    metric: MetricChoice
    quality: Quality
    speed: Comparison
    machine: Machine
    batch: int
    fed: str
    bounds: Bounds = Bounds()

    @property
    def violations(self) -> tuple[str, ...]:
        """What B breaks of the bounds, a sentence each.

        The loss counts as it was measured. B counts as slower where its time is, at the fast end of
        the 95% interval: a noisy machine breaks nothing.
        """
        broken = []
        quality, bounds = self.quality, self.bounds
        promise = compared(quality.metric)
        if bounds.max_drop is not None and not quality.drop <= bounds.max_drop + 1e-12:
            broken.append(
                f"{quality.metric} {promise.lost(quality.drop)}: more than the "
                f"{promise.text(bounds.max_drop)} of --max-drop"
            )
        slower = 1 / self.speed.high - 1
        if bounds.max_slowdown is not None and slower > bounds.max_slowdown:
            broken.append(
                f"B takes {1 / self.speed.speedup - 1:.1%} longer (at least {slower:.1%}): more "
                f"than the {bounds.max_slowdown:.1%} of --max-slowdown"
            )
        return tuple(broken)

    @property
    def theoretical_speedup(self) -> float:
        """The ratio of the multiply-accumulates; 1 where B has none."""
        return self.a.macs / self.b.macs if self.b.macs else 1.0


@dataclass(frozen=True)
class Benchmark:
    """Latency of one model, or of two that were timed in turn.

    Attributes
    ----------
    a : Timing
    comparison : Comparison or None
        None where only one model was timed.
    machine : Machine
    batch : int
        Number of samples in the batch that was timed.
    """

    a: Timing
    comparison: Comparison | None
    machine: Machine
    batch: int


def compare_models(
    a: Model,
    b: Model,
    machine: Machine,
    *,
    data: Data | None,
    labels: str | None,
    metric: str | None,
    shapes: Sequence[str],
    batch: int,
    limits: Limits,
    seed: int,
    bounds: Bounds,
    progress: Progress,
) -> ModelComparison:
    """Run both models on all samples, judge B against A, and time both in turn.

    Raises
    ------
    OnnxlrError
        If one of them can't be read or run, or their inputs and outputs differ.
    """
    sources = load(a), load(b)
    with progress.stage(opening_words(machine), None):
        session_a, feeding = open_with_feeding(
            sources[0],
            machine,
            data=data,
            validation=data,
            labels=labels,
            shapes=shapes,
            batch=batch,
            seed=seed,
        )
        feed = feeding.first_feed
        session_b = open_after_trial(sources[1], machine, feed)
    _check_same_outputs(session_a, session_b, feed)
    with progress.stage("run both on all samples", None):
        ends = endings(simplified_model(sources[0])[0])
        judge = Judge(session_a, feeding.judging, metric, ends=ends)
        quality = judge.judge(session_b)
    if judge.random_line:
        progress.tell(judge.random_line)
    with progress.stage("time both in turn", None):
        speed = compare_sessions(session_a, session_b, feed, limits)
    size_a, size_b = (_size(source, feed, machine) for source in sources)
    return ModelComparison(
        *(size_a, size_b, judge.choice, quality, speed),
        *(machine, _batch_size(feed), feeding.description, bounds),
    )


def bench_models(
    a: Model,
    b: Model | None,
    machine: Machine,
    *,
    data: Data | None,
    shapes: Sequence[str],
    batch: int,
    limits: Limits,
    seed: int,
    progress: Progress,
) -> Benchmark:
    """Time one model, or two in turn, for about as long as the limits say.

    Raises
    ------
    OnnxlrError
        If one of them can't be read or run, or B doesn't run on what A is run on.
    """
    source, other = load(a), None if b is None else load(b)
    with progress.stage(opening_words(machine), None):
        session_a, feeding = open_with_feeding(
            source, machine, data=data, shapes=shapes, batch=batch, seed=seed
        )
        feed = feeding.first_feed
        session_b = None if other is None else open_after_trial(other, machine, feed)
    if session_b is None:
        with progress.stage("time it", None):
            timing = time_session(session_a, feed, limits)
        return Benchmark(timing, None, machine, _batch_size(feed))
    with progress.stage("time both in turn", None):
        comparison = compare_sessions(session_a, session_b, feed, limits)
    return Benchmark(comparison.a, comparison, machine, _batch_size(feed))


def _check_same_outputs(a: Session, b: Session, feed: Feed) -> None:
    """Refuse a model that lacks an output of the first, or gives it in another shape."""
    absent = set(a.output_names) - set(b.output_names)
    if absent:
        raise UsageError(
            f"{b.label} has no output {sorted(absent)[0]!r} as {a.label} has: "
            "compare models with the same outputs"
        )
    outputs_a, outputs_b = a.run(feed), b.run(feed)
    for name, output in outputs_a.items():
        other, declared = outputs_b[name], a.declared_shape(name)
        follows = output.ndim == other.ndim == len(declared) and all(
            size == others or not isinstance(dim, int)
            for size, others, dim in zip(output.shape, other.shape, declared, strict=True)
        )
        if output.shape != other.shape and not follows:  # by its values, as boxes that are found
            raise UsageError(
                f"the output {name!r} has shape {list(output.shape)} in {a.label} and "
                f"{list(other.shape)} in {b.label}: compare models with outputs of one shape"
            )


def _size(source: Source, feed: Feed, machine: Machine) -> Size:
    prepared = prepare(source, feed=feed, machine=machine)
    macs = count_macs(prepared.model, prepared.shapes)
    return Size(source.label, source.nbytes, count_params(source.model), macs)


def _batch_size(feed: Feed) -> int:
    """The number of samples in a feed; 1 where its first input has no axes, or there is none."""
    first = next(iter(feed.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1
