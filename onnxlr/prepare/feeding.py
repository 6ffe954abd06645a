"""What a model is run on: the user's samples, or synthetic inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from onnxlr.errors import UsageError
from onnxlr.model.load import Source
from onnxlr.prepare.doubts import doubts_about
from onnxlr.prepare.inputs import check_feedable, input_specs, parse_shapes
from onnxlr.prepare.opening import open_session, open_trial
from onnxlr.prepare.samples import Samples, load_samples, share_of
from onnxlr.prepare.synthetic import find_runnable_shapes, synthetic_feeds
from onnxlr.system.deadline import trials_enabled
from onnxlr.system.in_memory import Data
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.system.trial import Trial
from onnxlr.types import Shape

SYNTHETIC_SAMPLES = 8
# Of the samples that factors are fitted to: one half of the data tests, and the rest chooses.
SHARE = (1, 3)
SHARE_BESIDE_VALIDATION = (2, 3)


@dataclass(frozen=True, eq=False)
class Feeding:
    """What a model is run on.

    Attributes
    ----------
    first_feed : feed
        The feed that latency is measured on, and that shapes are inferred for.
    choose : Samples or list of feeds
        What models are compared on while one of them is chosen: samples of the user's, or synthetic
        feeds.
    fit : Samples or None
        What factors are fitted to and sensitivities are measured on.
    test : Samples or None
        What the chosen model is tested on, and what nothing that chooses has looked at; None where
        there are no samples, or only one.
    share : tuple of int
        Numerator and denominator of the share of the user's samples that ``fit`` is.
    doubts : tuple of str
        What looks wrong with the user's samples, in sentences.
    """

    first_feed: Feed
    choose: Samples | Sequence[Feed]
    fit: Samples | None = None
    test: Samples | None = None
    share: tuple[int, int] = (1, 1)
    doubts: tuple[str, ...] = ()

    @property
    def judging(self) -> Samples | Sequence[Feed]:
        """What has the last word: the test samples, else those that choose, or synthetic feeds."""
        return self.choose if self.test is None else self.test

    @property
    def description(self) -> str:
        """What has the last word, in words."""
        if not isinstance(self.judging, Samples):
            return "synthetic inputs: give --data for a verdict on real ones"
        return f"{len(self.judging)} samples of {self.judging.label}"


def choose_feeding(
    source: Source,
    session: Session | Trial,
    *,
    data: Data | None = None,
    validation: Data | None = None,
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
        Samples to fit and choose on, and to test on. Without validation one half of the data tests.
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
    check_feedable(source.model)
    specs = input_specs(source.model)
    fixed_shapes = parse_shapes(shapes, specs)
    if data is None:
        if validation is not None or labels is not None:
            raise UsageError("--validation and --labels go with --data: name the samples")
        sizes, level = find_runnable_shapes(source.model, session, fixed_shapes, batch, seed)
        first = synthetic_feeds(source.model, sizes, level, seed, 1)[0]
        feeds = synthetic_feeds(source.model, sizes, level, seed, SYNTHETIC_SAMPLES)
        return Feeding(first, feeds)
    if fixed_shapes:
        raise UsageError("--shape and --data exclude each other: the samples have shapes")
    samples = load_samples(data, specs, labels, labels_optional=validation is not None)
    if validation is not None:
        test = load_samples(validation, samples.specs, labels)
        count = share_of(len(samples), SHARE_BESIDE_VALIDATION)
        fit, choose = samples.in_parts(seed, count, len(samples) - count)
        share = SHARE_BESIDE_VALIDATION
    else:
        count, half = share_of(len(samples), SHARE), len(samples) // 2
        fit, choose, test = samples.in_parts(seed, count, max(half - count, 0), len(samples) - half)
        share = SHARE
    return Feeding(
        first_feed(fit, batch),
        choose if len(choose) else fit,  # of three samples or fewer
        fit,
        test if len(samples) > 1 or validation is not None else None,
        share,
        doubts_about(samples, source.model),
    )


def first_feed(samples: Samples, batch: int) -> Feed:
    """The first ``batch`` of the calibration samples, or as many as the model fixes."""
    fixed = any(s.fixed_batch is not None for s in samples.specs)
    size = samples.batch if samples.batch == 1 or fixed else batch
    return next(iter(samples.batches(size)))[0]


def runnable_feed(source: Source, machine: Machine, shapes: Mapping[str, Shape], seed: int) -> Feed:
    """A synthetic feed of these shapes that a model runs on; a child process tries it first.

    Raises
    ------
    ModelError
        If the model doesn't run, or crashes.
    """
    find = partial(find_runnable_shapes, source.model, fixed=shapes, batch=1, seed=seed)
    if trials_enabled():
        with open_trial(source, machine) as trial:
            sizes, level = find(trial)
    else:
        sizes, level = find(open_session(source, machine))
    return synthetic_feeds(source.model, sizes, level, seed, 1)[0]


def open_with_feeding(
    source: Source,
    machine: Machine,
    *,
    data: Data | None = None,
    validation: Data | None = None,
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
