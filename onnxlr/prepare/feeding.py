"""What a model is run on: the user's samples, or synthetic inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onnxlr.errors import UsageError
from onnxlr.model.load import Source
from onnxlr.prepare.inputs import input_specs, parse_shapes
from onnxlr.prepare.opening import open_session, open_trial
from onnxlr.prepare.samples import Samples, load_samples
from onnxlr.prepare.synthetic import find_runnable_shapes, synthetic_feeds
from onnxlr.system.deadline import trials_enabled
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.system.trial import Trial

SYNTHETIC_SAMPLES = 8


@dataclass(frozen=True, eq=False)
class Feeding:
    """What a model is run on.

    Attributes
    ----------
    first_feed : feed
        The feed that latency is measured on, and that shapes are inferred for.
    validation : Samples or list of feeds
        What quality is measured on: the user's validation samples, or synthetic feeds.
    description : str
        What quality is measured on, in words for the report.
    calibration : Samples or None
        What factors are fitted to and sensitivities are measured on; none of the validation
        samples is among them.
    half : bool
        Whether calibration and validation are the two halves of the same samples.
    """

    first_feed: Feed
    validation: Samples | Sequence[Feed]
    description: str
    calibration: Samples | None = None
    half: bool = True


def choose_feeding(
    source: Source,
    session: Session | Trial,
    *,
    data: str | Path | None = None,
    validation: str | Path | None = None,
    labels: str | None = None,
    shapes: Sequence[str] = (),
    batch: int = 1,
    seed: int = 0,
) -> Feeding:
    """Choose what a model is run on: the user's samples, or synthetic inputs where there are none.

    Parameters
    ----------
    source : Source
    session : Session or Trial
        The model, opened: it runs synthetic inputs of several sizes until one works.
    data, validation : path or None
        Samples to calibrate on and to validate on; data without validation is split in halves.
    labels : str or None
        Name of the array of labels.
    shapes : sequence of str
        Sizes of synthetic inputs, as ``--shape`` takes them.
    batch : int
        Samples in the feed that latency is measured on.
    seed : int

    Raises
    ------
    UsageError
        If labels or validation samples come without data, or shapes with it.
    DataError
        If the samples don't fit the model.
    ModelError
        If the model runs on none of the synthetic inputs.
    """
    specs = input_specs(source.model)
    fixed_shapes = parse_shapes(shapes, specs)
    if data is None:
        if validation is not None or labels is not None:
            raise UsageError("--validation and --labels go with --data: name the samples")
        sizes, level = find_runnable_shapes(source.model, session, fixed_shapes, batch, seed)
        first = synthetic_feeds(source.model, sizes, level, seed, 1)[0]
        feeds = synthetic_feeds(source.model, sizes, level, seed, SYNTHETIC_SAMPLES)
        return Feeding(first, feeds, "synthetic inputs: give --data for a verdict on real ones")
    if fixed_shapes:
        raise UsageError("--shape and --data exclude each other: the samples have shapes")
    samples = load_samples(data, specs, labels, labels_optional=validation is not None)
    if validation is not None:
        calibration, others = samples, load_samples(validation, specs, labels)
    else:
        calibration, others = samples.split(seed)
    first = first_feed(calibration, batch)
    description = f"{len(others)} samples of {others.label}"
    return Feeding(first, others, description, calibration, validation is None)


def first_feed(samples: Samples, batch: int) -> Feed:
    """The first ``batch`` of the calibration samples, or as many as the model fixes."""
    fixed = any(s.fixed_batch is not None for s in samples.specs)
    size = samples.batch if samples.batch == 1 or fixed else batch
    return next(iter(samples.batches(size)))[0]


def open_with_feeding(
    source: Source,
    machine: Machine,
    *,
    data: str | Path | None = None,
    validation: str | Path | None = None,
    labels: str | None = None,
    shapes: Sequence[str] = (),
    batch: int = 1,
    seed: int = 0,
) -> tuple[Session, Feeding]:
    """A model in ONNX Runtime, and what it is run on.

    A child process opens and runs it first: an unfamiliar model may bring the runtime down, or
    never come to an end. The arguments are those of ``choose_feeding``.

    Raises
    ------
    OnnxlrError
        As ``choose_feeding`` and ``open_session`` do, and where the child process crashes.
    """
    choose = partial(
        choose_feeding,
        source,
        data=data,
        validation=validation,
        labels=labels,
        shapes=shapes,
        batch=batch,
        seed=seed,
    )
    if not trials_enabled():
        session = open_session(source, machine)
        return session, choose(session)
    with open_trial(source, machine) as trial:
        trial.open()
        feeding = choose(trial)
        if data is not None:
            trial.run(feeding.first_feed)
    return open_session(source, machine), feeding
