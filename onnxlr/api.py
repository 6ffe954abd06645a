"""The Python face: the commands as functions, arguments named as the flags."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from onnxlr.arguments import (
    FileName,
    Model,
    as_tuple,
    check_jobs,
    check_outputs,
    check_runs_whole,
    check_seconds,
    model_destination,
    parse_ingredients,
    parse_machine,
    parse_max_drop,
    parse_target,
    parse_verify,
    path_of,
    read_plan,
)
from onnxlr.comparison import Benchmark, ModelComparison, bench_models, compare_models
from onnxlr.decompose import parse_rank
from onnxlr.errors import UsageError
from onnxlr.inspection import LayerInspection, inspect_source
from onnxlr.limits import USUAL
from onnxlr.methods.registry import choose_passes
from onnxlr.model.destinations import check_destination, check_external
from onnxlr.model.load import load
from onnxlr.options import Options, command_of
from onnxlr.pipeline import Result
from onnxlr.pipeline import optimize as run_optimizer
from onnxlr.plan.plan import Plan
from onnxlr.progress import Progress, Silent
from onnxlr.replay import replay
from onnxlr.report.html import write_page
from onnxlr.report.report import json_text
from onnxlr.report.svg import start_figures
from onnxlr.system.session import Provider

LIMITS = USUAL  # what every run is handed


def optimize(
    model: Model,
    out: FileName | None = None,
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
    goal, fraction = parse_target(target)
    if fraction is not None and str(rank) != "auto":
        raise UsageError(
            f"--target {target} chooses the ranks, --rank {rank} names them: leave one out"
        )
    verification, allowed_drop = parse_verify(verify), parse_max_drop(max_drop)
    unrun = verification == "none"
    check_runs_whole(
        verification,
        {
            "--data": data if unrun else None,
            "--validation": validation if unrun else None,
            "--labels": labels,
            "--metric": metric,
            "--target latency": goal if goal == "latency" and unrun else None,
            "--target with a fraction": fraction,
            "--latency-table": latency_table if unrun else None,
        },
    )
    left_out = parse_ingredients(without)
    check_jobs(jobs)
    options = Options(
        methods=as_tuple(method),
        rank=parse_rank(str(rank)),
        target=goal,
        fraction=fraction,
        metric=metric,
        max_drop=allowed_drop,
        include=include,
        exclude=exclude,
        machine=parse_machine(provider, threads, batch, seed),
        batch=int(batch),
        shapes=as_tuple(shape),
        data=data,
        validation=validation,
        labels=labels,
        verify=verification,
        expand_at_load=expand_at_load,
        measure=measure,
        latency_table=latency_table,
        without=left_out,
        seed=int(seed),
        jobs=jobs,
        dask=dask,
        report=report,
        limits=LIMITS,
    )
    options = replace(options, command=command_of(options, path_of(model), out))
    choose_passes(options.methods)
    return _write_optimized(model, out, (plan_out, report, json), options, progress or Silent())


def _write_optimized(
    model: Model,
    out: FileName | None,
    names: tuple[FileName | None, FileName | None, FileName | None],
    options: Options,
    progress: Progress,
) -> Result:
    """Optimize once all that is to be written can be: OUT, and the plan, the page and the JSON."""
    inputs = (options.data, options.validation, options.latency_table)
    path = model_destination(out, model, *inputs)
    plan_path, page_path, json_path = (None if n is None else Path(n) for n in names)
    paths = [p for p in (plan_path, page_path, json_path) if p is not None]
    for text_path in paths:
        check_destination(text_path, path_of(model), *inputs)
    if page_path is not None:
        start_figures()
    source = load(model)
    table = None if options.latency_table is None else Path(options.latency_table)
    check_outputs(source, path, paths, table)

    def texts(result: Result) -> dict[Path, str]:
        contents = {}
        if plan_path is not None:
            contents[plan_path] = result.plan.to_json()
        if page_path is not None:
            contents[page_path] = write_page(result.report)
        if json_path is not None:
            contents[json_path] = json_text(result.report.to_dict())
        return contents

    return run_optimizer(source, path, options, progress, texts)


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
    methods = as_tuple(method)
    parse_machine("cpu", 1, batch, 0)
    return inspect_source(
        load(model), methods, include, exclude, as_tuple(shape), batch, progress or Silent()
    )


def apply(
    plan: FileName | Plan,
    model: Model,
    out: FileName | None = None,
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
    plan_path, plan = (None, plan) if isinstance(plan, Plan) else (plan, read_plan(plan))
    samples = None if plan.calibration is None else plan.calibration.data
    path = model_destination(out, model, plan_path, data, samples)
    source = load(model)
    if path is not None:
        check_external(path, source, path)
    return replay(plan, source, path, data, progress or Silent())


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
    return compare_models(
        a,
        b,
        parse_machine(provider, threads, batch, seed),
        data=data,
        labels=labels,
        metric=metric,
        shapes=as_tuple(shape),
        batch=batch,
        limits=LIMITS,
        seed=seed,
        progress=progress or Silent(),
    )


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
    machine = parse_machine(provider, threads, batch, seed)
    check_seconds(seconds)
    return bench_models(
        a,
        b,
        machine,
        data=data,
        shapes=as_tuple(shape),
        batch=batch,
        limits=replace(LIMITS, timing_seconds=seconds),
        seed=seed,
        progress=progress or Silent(),
    )
