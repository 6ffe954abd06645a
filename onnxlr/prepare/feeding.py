"""What a model is run on: the user's samples or drawn inputs, and the sessions that run it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from onnxlr.errors import ModelError, UsageError
from onnxlr.model.graph import all_graphs
from onnxlr.model.load import Source
from onnxlr.model.protobuf import serialize, to_proto
from onnxlr.prepare.samples import Samples, load_samples
from onnxlr.prepare.synthetic import (
    find_runnable_shapes,
    input_specs,
    parse_shapes,
    synthetic_feeds,
)
from onnxlr.system.deadline import trials_enabled
from onnxlr.system.memory import available_memory, format_bytes
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.system.trial import Trial

SYNTHETIC_SAMPLES = 8
# Of the size of its weights, what the runtime takes while it opens a model: measured, rounded up.
_OPENING, _OPENING_HALF = 2, 3


@dataclass(frozen=True, eq=False)
class Feeding:
    """What a model is run on.

    Attributes
    ----------
    first_feed : feed
        One feed of the batch that is timed.
    validation : Samples or list of feeds
        What quality is measured on: the user's validation samples, or synthetic feeds.
    description : str
        What it is, for the report.
    calibration : Samples or None
        What factors are fitted to and sensitivities are measured on: none of those judged on.
    half : bool
        Whether those are one half of the samples, and the judged the other.
    """

    first_feed: Feed
    validation: Samples | Sequence[Feed]
    description: str
    calibration: Samples | None = None
    half: bool = True


def open_session(source: Source, machine: Machine) -> Session:
    """The original in ONNX Runtime.

    Raises
    ------
    ModelError
        If there is not enough memory for it, or the runtime refuses it.
    """
    check_memory(source, machine, 1)
    return Session(_runnable(source), machine, source.label)


def _runnable(source: Source) -> Path | bytes:
    if source.path is not None:
        return source.path
    return serialize(to_proto(source.model), source.label)


def check_memory(source: Source, machine: Machine, models: int) -> None:
    """Refuse to open a model that will not fit into memory.

    Parameters
    ----------
    models : int
        Of its size, that are open at the same time.

    Raises
    ------
    ModelError
        With what it takes, what there is, and what to do.
    """
    needed, room = models * runtime_bytes(source.model, machine), available_memory()
    if needed > room:
        raise ModelError(
            f"{source.label} takes about {format_bytes(needed)} of memory to be run"
            f"{' beside what it becomes' if models > 1 else ''}, {format_bytes(room)} are free: --verify "
            "layers compares each layer alone, --verify none runs nothing; else use a machine with "
            "more memory"
        )


def runtime_bytes(model: ir.Model, machine: Machine) -> int:
    """Roughly what ONNX Runtime takes for a model's weights while it opens it."""
    total = 0
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            narrow = tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            # CPUs have no kernels for half precision: weights are cast once, and held as float32.
            widened = narrow and machine.provider == "cpu"
            total += (_OPENING_HALF if widened else _OPENING) * tensor.nbytes
    return total


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
) -> tuple[Session, "Feeding"]:
    """The original in ONNX Runtime, and what it is run on.

    It is opened and run in the child process first: a model that nobody knows may bring the runtime
    down, or never come to an end.

    Raises
    ------
    OnnxlrError
        As ``choose_feeding`` and ``open_session`` do, and for what the child process didn't survive.
    """
    fed = partial(
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
        return session, fed(session)
    with _trial(source, machine) as trial:
        trial.open()
        feeding = fed(trial)
        if data is not None:
            trial.run(feeding.first_feed)
    return open_session(source, machine), feeding


def open_after_trial(source: Source, machine: Machine, feed: Feed) -> Session:
    """Another model in ONNX Runtime, tried in the child process on this feed first."""
    trial_run(source, machine, feed)
    return open_session(source, machine)


def trial_run(source: Source, machine: Machine, feed: Feed) -> None:
    """Run a model once in the child process.

    Raises
    ------
    ModelError
        If it fails there, or there is not enough memory for it.
    """
    with _trial(source, machine) as trial:
        trial.run(feed)


def _trial(source: Source, machine: Machine) -> Trial:
    check_memory(source, machine, 1)
    return Trial(_runnable(source), machine, source.label, source.nbytes)


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
    """Decide what the model is run on: the user's samples if given, else synthetic ones.

    Raises
    ------
    UsageError
        If labels or validation samples come without data, or shapes with it.
    DataError
        If the samples don't fit the model.
    ModelError
        If the model runs on nothing that was tried.
    """
    specs = input_specs(source.model)
    given = parse_shapes(shapes, specs)
    if data is None:
        if validation is not None or labels is not None:
            raise UsageError("--validation and --labels go with --data: name the samples")
        found, level = find_runnable_shapes(source.model, session, given, batch, seed)
        timed = synthetic_feeds(source.model, found, level, seed, 1)[0]
        judged = synthetic_feeds(source.model, found, level, seed, SYNTHETIC_SAMPLES)
        return Feeding(timed, judged, "synthetic inputs: give --data for a verdict on real ones")
    if given:
        raise UsageError("--shape and --data exclude each other: the samples have shapes")
    samples = load_samples(data, specs, labels, labels_optional=validation is not None)
    if validation is not None:
        calibration, judged_samples = samples, load_samples(validation, specs, labels)
    else:
        calibration, judged_samples = samples.split(seed)
    timed = first_feed(calibration, batch)
    words = f"{len(judged_samples)} samples of {judged_samples.label}"
    return Feeding(timed, judged_samples, words, calibration, validation is None)


def first_feed(samples: Samples, batch: int) -> Feed:
    """What shapes are told by, and is timed: so many of the samples that factors are fitted to."""
    fixed = any(s.fixed_batch is not None for s in samples.specs)
    size = samples.batch if samples.batch == 1 or fixed else batch
    return next(iter(samples.batches(size)))[0]
