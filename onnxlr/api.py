"""The Python face: the commands as functions, arguments named as the flags."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import onnx

from onnxlr.decompose import parse_rank
from onnxlr.errors import UsageError
from onnxlr.inspection import LayerInspection, inspect_source
from onnxlr.layers.macs import count_macs
from onnxlr.methods.registry import choose_passes
from onnxlr.model.destinations import check_destination, check_distinct, check_external, is_there
from onnxlr.model.graph import count_params
from onnxlr.model.load import Source, load
from onnxlr.options import Ingredient, Options, Target, command_of
from onnxlr.pipeline import Result
from onnxlr.pipeline import optimize as run_optimizer
from onnxlr.plan.plan import Plan
from onnxlr.prepare.feeding import Feeding, open_after_trial, open_with_feeding
from onnxlr.prepare.prepared import prepare
from onnxlr.progress import Progress, Silent
from onnxlr.replay import replay
from onnxlr.report.html import write_page
from onnxlr.report.report import Size, json_text
from onnxlr.report.svg import start_figures
from onnxlr.system.process import can_start
from onnxlr.system.session import Machine, Provider
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency import Comparison, Timing, compare_sessions, time_session

Model = str | os.PathLike[str] | bytes | onnx.ModelProto | Source


def optimize(
    model: Model,
    out: str | os.PathLike[str] | None = None,
    *,
    data: str | Path | None = None,
    validation: str | Path | None = None,
    labels: str | None = None,
    metric: str | None = None,
    max_drop: float = 0.01,
    target: str | None = None,
    method: str | Sequence[str] = "auto",
    rank: str | int = "auto",
    include: str | None = None,
    exclude: str | None = None,
    provider: Provider = "cpu",
    threads: int = 1,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    verify: str = "full",
    expand_at_load: bool = False,
    measure: bool = True,
    latency_table: str | Path | None = None,
    without: str | Sequence[str] = (),
    plan_out: str | Path | None = None,
    report: str | Path | None = None,
    json: str | Path | None = None,
    seed: int = 0,
    jobs: int | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Replace a model's heavy weights by low-rank chains, verified on the saved file.

    Parameters
    ----------
    model : path, bytes or ModelProto
    out : path, optional
        Where to write; written whole or not at all. Without it, only ``Result.model`` is made.
    data, validation : path, optional
        ``.npz``, ``.npy`` or a folder of such files. Half of ``data`` is kept for validation
        unless ``validation`` names another file.
    labels : str, optional
        Name of the array of integer labels in the data.
    metric : str, optional
        ``top1``, ``agreement``, ``rel-error``, ``cosine`` or ``module:function``.
    max_drop : float
        Largest loss of the metric; 1 = no limit.
    target : {"latency", "macs", "params", "bytes"}, optional
        Latency puts back whatever is not measurably faster. With a fraction (``"macs=0.5"``) the
        least damaging model within that share of the original's.
    method : str or sequence of str
    rank : str or int
        ``auto``, ``evbmf``, ``exact``, a number, a pair (``"16,32"``, for ``tucker2``), a fraction
        of the full rank, ``energy:p``.
    include, exclude : str, optional
        Regular expressions searched in layer, weight and node names.
    provider : {"cpu", "cuda"}
    threads, batch : int
    shape : str or sequence of str
        ``NAME:1,3,224,224`` for inputs with dynamic axes.
    verify : {"full", "layers", "none"}
        The whole saved model; each replaced layer alone, for models that can't be run here; or
        only the graph.
    expand_at_load : bool
        Also store weights, of any operator, as factors that are multiplied in the graph: the file
        gets smaller, the run stays as it is.
    measure : bool
        False estimates latencies from the work, for a machine that isn't at hand.
    latency_table : path, optional
        JSON file of latencies in place of this machine's own; written if it isn't there. A table of
        another machine is used as it is.
    without : str or sequence of {"data", "sensitivity", "sequential"}
        Ingredients to leave out, to see what each brings.
    plan_out, report, json : path, optional
        Where to write the plan, for ``apply``; the report as a self-contained HTML page; and as
        JSON. If one of them can't be written, ``out`` isn't either.
    seed : int
    jobs : int, optional
        Processes for what can be computed side by side; as many as there are cores by default.
        Nothing is timed while they work.
    dask : str, optional
        Address of a dask scheduler whose workers do that instead. They read the model from the path
        it has here.

    Returns
    -------
    Result
        ``model``, ``plan`` and ``report``. A model with external data, written to ``out``, is given
        without them: they are beside it.

    Raises
    ------
    OnnxlrError
        With one line that says what, the values and the remedy.

    Examples
    --------
    >>> result = optimize("models/fashion-mlp.onnx", rank="evbmf", verify="none")
    >>> len(result.plan.replaced) > 0
    True
    """
    goal, fraction = _target(target)
    if fraction is not None and str(rank) != "auto":
        raise UsageError(
            f"--target {target} chooses the ranks, --rank {rank} names them: leave one out"
        )
    if verify not in ("full", "layers", "none"):
        raise UsageError(f"--verify {verify!r} is unknown: full, layers or none")
    if not max_drop >= 0:
        raise UsageError(f"--max-drop {max_drop} is not a loss: give 0 or more, 1 = no limit")
    _check_verify(
        verify,
        {
            "--data": data if verify == "none" else None,
            "--validation": validation if verify == "none" else None,
            "--labels": labels,
            "--metric": metric,
            "--target latency": goal if goal == "latency" and verify == "none" else None,
            "--target with a fraction": fraction,
            "--latency-table": latency_table if verify == "none" else None,
        },
    )
    left_out = _ingredients(without)
    if jobs is not None and not 1 <= jobs <= 1024:
        raise UsageError(f"--jobs {jobs} must be at least 1 and at most 1024")
    options = Options(
        methods=_several(method),
        rank=parse_rank(str(rank)),
        target=goal,
        fraction=fraction,
        metric=metric,
        # The metrics are shares and relative errors: 1 is promised to be no limit at all.
        max_drop=float("inf") if max_drop >= 1 else float(max_drop),
        include=include,
        exclude=exclude,
        machine=_machine(provider, threads, batch, seed),
        batch=int(batch),
        shapes=_several(shape),
        data=data,
        validation=validation,
        labels=labels,
        verify=verify,  # type: ignore[arg-type]
        expand_at_load=expand_at_load,
        measure=measure,
        latency_table=latency_table,
        without=left_out,
        seed=int(seed),
        jobs=jobs,
        dask=dask,
        report=report,
    )
    options = replace(options, command=command_of(options, _path_of(model), out))
    choose_passes(options.methods)
    path = _destination(out, model, data, validation, latency_table)
    told = [None if name is None else Path(name) for name in (plan_out, report, json)]
    for text in told:
        if text is not None:
            check_destination(text, _path_of(model), data, validation, latency_table)
    if report is not None:
        start_figures()
    source = load(model)
    table = None if latency_table is None else Path(latency_table)
    outputs = [output for output in (path, *told, table) if output is not None]
    check_distinct(*outputs)
    if table is not None and is_there(table):
        outputs.remove(table)  # it is read
    for output in outputs:
        check_external(output, source, path)

    def texts(result: Result) -> dict[Path, str]:
        makers: tuple[Callable[[], str], ...] = (
            result.plan.to_json,
            lambda: write_page(result.report),
            lambda: json_text(result.report.to_dict()),
        )
        return {p: make() for p, make in zip(told, makers, strict=True) if p is not None}

    return run_optimizer(source, path, options, progress or Silent(), texts)


def inspect(
    model: Model,
    *,
    method: str | Sequence[str] = "auto",
    include: str | None = None,
    exclude: str | None = None,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[LayerInspection, ...]:
    """Every layer with its spectrum, EVBMF rank, methods that fit, break-even rank and reasons.

    Nothing is run: MACs are for the sizes given with ``shape``, or the first that make sense.

    Examples
    --------
    >>> rows = inspect("models/fashion-mlp.onnx")
    >>> [fit.method for fit in rows[0].fits]
    ['svd']
    """
    methods = _several(method)
    _machine("cpu", 1, batch, 0)
    return inspect_source(
        load(model), methods, include, exclude, _several(shape), batch, progress or Silent()
    )


def apply(
    plan: str | os.PathLike[str] | Plan,
    model: Model,
    out: str | os.PathLike[str] | None = None,
    *,
    data: str | Path | None = None,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Replay a plan on the model that it was made for: the same bytes again.

    A plan whose factors were fitted to data needs that data again, from where it was or from
    ``data``. A model with external data, written to ``out``, is given without them.

    Raises
    ------
    UsageError
        If the plan isn't one, is for another model, or needs a method that isn't installed or
        samples that aren't there.
    """
    origin = None if isinstance(plan, Plan) else plan
    if not isinstance(plan, Plan):
        try:
            if Path(plan).exists() and not Path(plan).is_file():
                raise UsageError(f"the plan {plan} is not a regular file: name one of --plan-out")
            text = Path(plan).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # not UTF-8, or no name at all
            raise UsageError(f"can't read the plan {plan}: {error}") from None
        plan = Plan.from_json(text, str(plan))
    fitted = None if plan.calibration is None else plan.calibration.data
    path = _destination(out, model, origin, data, fitted)
    source = load(model)
    if path is not None:
        check_external(path, source, path)
    return replay(plan, source, path, data, progress or Silent())


@dataclass(frozen=True)
class ModelComparison:
    """Two models side by side: sizes, quality of B against A, and speed."""

    a: Size
    b: Size
    quality: Quality
    speed: Comparison
    machine: Machine
    batch: int
    fed: str

    @property
    def theoretical_speedup(self) -> float:
        """Ratio of the multiply-accumulates."""
        return self.a.macs / self.b.macs if self.b.macs else 1.0


def compare(
    a: Model,
    b: Model,
    *,
    data: str | Path | None = None,
    labels: str | None = None,
    metric: str | None = None,
    provider: Provider = "cpu",
    threads: int = 1,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelComparison:
    """Fidelity of B against A, the metric of both, size, MACs and interleaved speed.

    All of the data is used.

    Raises
    ------
    OnnxlrError
        If one of them can't be read or run, or their inputs and outputs differ.
    """
    machine = _machine(provider, threads, batch, seed)
    sources = load(a), load(b)
    original, feeding = open_with_feeding(
        sources[0],
        machine,
        data=data,
        validation=data,
        labels=labels,
        shapes=_several(shape),
        batch=batch,
        seed=seed,
    )
    sessions = original, open_after_trial(sources[1], machine, feeding.first_feed)
    missing = set(sessions[0].output_names) - set(sessions[1].output_names)
    if missing:
        raise UsageError(
            f"{sources[1].label} has no output {sorted(missing)[0]!r} as {sources[0].label} has: "
            "compare models with the same outputs"
        )
    first, second = (session.run(feeding.first_feed) for session in sessions)
    for name, output in first.items():
        if output.shape != second[name].shape:
            raise UsageError(
                f"the output {name!r} has shape {list(output.shape)} in {sources[0].label} and "
                f"{list(second[name].shape)} in {sources[1].label}: compare models that do the same"
            )
    told = progress or Silent()
    with told.stage("run both on all samples", None):
        quality = Judge(sessions[0], feeding.validation, metric).judge(sessions[1])
    with told.stage("time both in turn", None):
        speed = compare_sessions(sessions[0], sessions[1], feeding.first_feed)
    sizes = []
    for source in sources:
        ready = prepare(source, feed=feeding.first_feed, machine=machine)
        macs = count_macs(ready.model, ready.shapes)
        sizes.append(Size(source.label, source.nbytes, count_params(source.model), macs))
    return ModelComparison(
        sizes[0], sizes[1], quality, speed, machine, _first_size(feeding), feeding.description
    )


@dataclass(frozen=True)
class Benchmark:
    """Latency of one model, or of two in turn."""

    a: Timing
    comparison: Comparison | None
    machine: Machine
    batch: int


def bench(
    a: Model,
    b: Model | None = None,
    *,
    data: str | Path | None = None,
    provider: Provider = "cpu",
    threads: int = 1,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    seconds: float = 5.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Benchmark:
    """Latency on ONNX Runtime: of one model, or of two interleaved in one run."""
    machine = _machine(provider, threads, batch, seed)
    if not 0 < seconds <= 86_400:
        raise UsageError(f"--seconds {seconds} is no time to spend: give more than 0, up to a day")
    source = load(a)
    first, feeding = open_with_feeding(
        source, machine, data=data, shapes=_several(shape), batch=batch, seed=seed
    )
    size = _first_size(feeding)
    told = progress or Silent()
    if b is None:
        with told.stage("time it", None):
            return Benchmark(time_session(first, feeding.first_feed, seconds), None, machine, size)
    second = open_after_trial(load(b), machine, feeding.first_feed)
    with told.stage("time both in turn", None):
        result = compare_sessions(first, second, feeding.first_feed, seconds)
    return Benchmark(result.a, result, machine, size)


def _target(text: str | None) -> tuple[Target | None, float | None]:
    """A goal, and the fraction of the original that it is to come down to."""
    if text is None:
        return None, None
    name, given, share = text.partition("=")
    try:
        fraction = float(share) if given else None
    except ValueError:
        fraction = math.nan
    if name not in ("latency", "macs", "params", "bytes") or (
        fraction is not None and not 0 < fraction < 1
    ):
        raise UsageError(
            f"--target {text!r} is unknown: latency, macs, params or bytes, or one of them with a "
            "fraction between 0 and 1 (macs=0.5)"
        )
    return name, fraction  # type: ignore[return-value]


def _check_verify(verify: str, named: Mapping[str, object]) -> None:
    if verify == "full":
        return
    for flag, value in named.items():
        if value is not None:
            raise UsageError(
                f"--verify {verify} judges no whole model, {flag} needs a run: leave one out"
            )


def _ingredients(names: str | Sequence[str]) -> tuple[Ingredient, ...]:
    given = _several(names)
    known = get_args(Ingredient)
    for name in given:
        if name not in known:
            raise UsageError(f"--without {name!r} is unknown: choose from {', '.join(known)}")
    return given  # type: ignore[return-value]


def _path_of(model: Model) -> str | os.PathLike[str] | None:
    if isinstance(model, Source):
        return model.path
    return model if isinstance(model, (str, os.PathLike)) else None


def _machine(provider: Provider, threads: int, batch: int, seed: int) -> Machine:
    if provider not in ("cpu", "cuda"):
        raise UsageError(f"--provider {provider!r} is unknown: cpu or cuda")
    for flag, number, least, most in (
        ("--threads", threads, 1, 1024),
        ("--batch", batch, 1, 1 << 20),
        ("--seed", seed, 0, 2**63),
    ):
        if not least <= number <= most:
            raise UsageError(f"{flag} {number} must be at least {least} and at most {most}")
    # Here, and in the process beside this one; ONNX Runtime waits for ever for those it can't have.
    if threads > 1 and not can_start(2 * threads):
        raise UsageError(
            f"--threads {threads}: this user may not have so many more threads (ulimit -u, or the "
            "container's limit of pids): name fewer, or raise the limit"
        )
    return Machine(provider, int(threads))


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _destination(
    out: str | os.PathLike[str] | None, model: Model, *others: str | os.PathLike[str] | None
) -> Path | None:
    if out is None:
        return None
    path = Path(out)
    if path.suffix == ".ort":
        raise UsageError(
            f"{path}: ONNX Runtime takes what ends in .ort for a format of its own: name it .onnx"
        )
    check_destination(path, _path_of(model), *others)
    return path


def _first_size(feeding: Feeding) -> int:
    first = next(iter(feeding.first_feed.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1
