"""The public functions: one for each command, with arguments named as its flags."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from onnxlr.api import arguments
from onnxlr.api.arguments import FileName
from onnxlr.api.outputs import OutputNames, model_destination, optimize_to_files
from onnxlr.behind.step import Given
from onnxlr.decompose import parse_rank
from onnxlr.jobs.inspection import Inspection, inspect_source
from onnxlr.jobs.pipeline import Result
from onnxlr.jobs.replay import replay
from onnxlr.limits import USUAL
from onnxlr.methods.registry import choose_passes
from onnxlr.model.destinations import check_external
from onnxlr.model.load import Model, load
from onnxlr.options import Options, command_of
from onnxlr.plan.plan import Plan
from onnxlr.progress import Progress, Silent
from onnxlr.system.in_memory import InMemory, SampleData, as_data

LIMITS = USUAL  # the effort of every run


def optimize(
    model: Model,
    out: FileName | None = None,
    *,
    data: SampleData | None = None,
    validation: SampleData | None = None,
    labels: str | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    confidence: float | None = None,
    target: str | None = None,
    method: str | Sequence[str] = "auto",
    rank: str | int = "auto",
    include: str | None = None,
    exclude: str | None = None,
    provider: str | Sequence[str] = "cpu",
    provider_option: str | Sequence[str] = (),
    provider_library: str | Sequence[str] = (),
    threads: int = 1,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    verify: str = "full",
    expand_at_load: bool = False,
    behind: Given | None = None,
    behind_out: str | Path | None = None,
    measure: bool = True,
    remeasure: bool = False,
    latency_table: str | Path | None = None,
    without: str | Sequence[str] = (),
    plan_out: str | Path | None = None,
    report: str | Path | None = None,
    frontier: str | Path | None = None,
    json: str | Path | None = None,
    seed: int = 0,
    time_limit: float | None = None,
    jobs: int | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Replace a model's heavy weights by low-rank chains, verified on the saved file.

    Parameters
    ----------
    model : path, bytes, ModelProto, or another library's model
        An ``onnx_ir.Model``, an ``onnx_graphsurgeon.Graph`` or the ``ONNXProgram`` of torch.
    out : path, optional
        Where to write the result, whole or not at all. Without it nothing is written.
    data, validation : path, dict of arrays, array, or iterable of batches, optional
        Samples: a ``.npz`` with one array of shape (samples, ...) per input, a ``.npy``, or a
        folder of such files; or the same in memory, as a dict of arrays, an array for a model with
        one input, or an iterable of batches, such as a ``DataLoader`` gives: dicts, or arrays in
        the order of the model's inputs, after which labels may come. Half of ``data`` is used for
        fitting and choosing and the other half for testing, unless ``validation`` holds the test
        samples. Without data, models are judged on synthetic inputs.
    labels : str, optional
        Name of the array of integer labels, one per sample, in the data.
    metric : str, optional
        ``top1``, ``agreement``, ``rel-error``, ``cosine`` or ``module:function``. By default it is
        what fits the outputs: for class scores top1 with labels, else agreement; cosine for
        embeddings; rel-error for all else. The first of the report's notes says which, and why.
    max_drop : float, optional
        Largest loss of the metric that is allowed; 1 means no limit. By default 0.01 for top1,
        agreement and a function, 0.02 for cosine, and 0.05 for rel-error.
    confidence : float, optional
        Confidence at which the test samples have to show that the loss is within ``max_drop``. By
        default it is 0.95, or the highest that so many samples can show of a model without loss;
        0.5 is about as strict as comparing two numbers.
    target : {"latency", "macs", "params", "bytes"}, optional
        What to save. With latency, the default, layers that aren't measurably faster are put back;
        beside a named ``rank``, only if latency is named here. With a
        fraction (``"macs=0.5"``) the result is the least damaging model within that share of the
        original's.
    method : str or sequence of str
        Names of the methods to choose from; ``auto`` means all that need not be named.
    rank : str or int
        ``auto``, ``evbmf``, ``exact``, a number, a pair (``"16,32"``, for ``tucker2``), a rank on
        p×q tiles (``"8,2,2"``), a fraction of the full rank (``"0.5"``), or ``energy:p``.
    include, exclude : str, optional
        Regular expressions that are searched in layer, weight and node names.
    provider : str or sequence of str
        Execution providers of ONNX Runtime, in order: ``"openvino"``, ``"tensorrt,cuda"``.
    provider_option : str or sequence of str
        ``KEY=VALUE`` for the first of them, ``NAME:KEY=VALUE`` for another.
    provider_library : str or sequence of str
        ``NAME=PATH`` of a library that brings a provider, to be registered by that name.
    threads, batch : int
        Number of intra-op threads and of samples in the batch with which speed is measured.
    shape : str or sequence of str
        ``NAME:1,3,224,224`` for every input with dynamic axes, where there is no data.
    verify : {"full", "layers", "none"}
        What is run: the whole saved model beside the original; each replaced layer alone, for
        models that can't be run here; or nothing.
    expand_at_load : bool
        Also store weights, of any operator, as factors that are multiplied when the session loads:
        the file gets smaller, the run time stays the same.
    behind : str or callable, optional
        A step that will follow: ``int8-dynamic``, ``int8-static`` (which calibrates on samples
        that factors are fitted to), ``fp16``, ``module:function``, or a function that takes the
        path of a model, which is a copy, and returns that of the model that it made. All that is
        tried is judged and timed after this step. Losses count against the original without it, so
        that the limit holds for both together; speed is compared with the original after it. What
        is written to ``out`` is the file before it.
    behind_out : path, optional
        Where to write the file after that step: the very one that was judged and timed.
    measure : bool
        False estimates latencies from the work, for a machine that isn't at hand.
    remeasure : bool
        True takes all timings anew, in place of those that earlier runs left.
    latency_table : path, optional
        JSON file of latencies in milliseconds to use in place of this machine's. If there is no
        such file, it is written. A table of another machine is used as it is.
    without : str or sequence of {"data", "sensitivity", "sequential", "widths"}
        Ingredients to leave out, to see what each brings.
    plan_out, report, json : path, optional
        Where to write the plan, for ``apply``; the report as a self-contained HTML page; and the
        report as JSON. If one of them can't be written, ``out`` isn't either.
    frontier : path, optional
        A new folder for the plans of all models that were judged.
    seed : int
        Seed of the random splits and of synthetic inputs.
    time_limit : float, optional
        Longest time that the run should take, in seconds: to keep it, less is tried and timed.
    jobs : int, optional
        Number of processes for what can be computed side by side; by default as many as there are
        cores. Nothing is timed while they work.
    dask : str, optional
        Address of a dask scheduler whose workers do that work instead. They read the model from the
        path that it has here.
    progress : Progress, optional
        Listener that is told of every stage; by default there is none.

    Returns
    -------
    Result
        ``model``, ``plan`` and ``report``. If the model was written to ``out`` with external data,
        the ``model`` comes without them.

    Raises
    ------
    OnnxlrError
        If the arguments make no sense (``UsageError``), the model or the data can't be used
        (``ModelError``, ``DataError``), the budget can't be met within ``max_drop``
        (``BudgetError``), or the machine lacks something. Its message is one line: what happened,
        the values and the remedy. Nothing is written then.

    Examples
    --------
    >>> result = optimize("models/fashion-mlp.onnx", rank="evbmf", verify="none")
    >>> len(result.plan.replaced) > 0
    True
    """
    given, testing = as_data(data), as_data(validation)
    goal, fraction = arguments.parse_target(target)
    arguments.check_rank(rank, target, fraction)
    verification, allowed_drop = arguments.parse_verify(verify), arguments.parse_max_drop(max_drop)
    arguments.check_runs_whole(
        *(verification, goal, fraction, labels, metric, confidence, given, testing),
        *(latency_table, behind),
    )
    arguments.check_remeasure(remeasure, measure, verification)
    arguments.check_confidence(confidence, given, metric)
    left_out = arguments.parse_ingredients(without)
    arguments.check_jobs(jobs)
    seconds = arguments.parse_time_limit(time_limit)
    options = Options(
        methods=arguments.as_tuple(method),
        rank=parse_rank(str(rank)),
        target=goal,
        fraction=fraction,
        metric=metric,
        max_drop=allowed_drop,
        confidence=confidence,
        include=include,
        exclude=exclude,
        machine=arguments.parse_machine(
            *(provider, threads, batch, seed),
            options=provider_option,
            libraries=provider_library,
        ),
        batch=int(batch),
        shapes=arguments.as_tuple(shape),
        data=given,
        validation=testing,
        labels=labels,
        verify=verification,
        expand_at_load=expand_at_load,
        behind=arguments.parse_step(behind, behind_out, given),
        behind_out=behind_out,
        measure=measure,
        remeasure=remeasure,
        latency_table=latency_table,
        without=left_out,
        seed=int(seed),
        time_limit=seconds,
        jobs=jobs,
        dask=dask,
        report=report,
        limits=LIMITS.within(seconds),
    )
    options = replace(options, command=command_of(options, arguments.path_of(model), out))
    choose_passes(options.methods)
    names = OutputNames(plan_out, report, json, frontier)
    return optimize_to_files(model, out, names, options, progress or Silent())


def inspect(
    model: Model,
    *,
    method: str | Sequence[str] = "auto",
    include: str | None = None,
    exclude: str | None = None,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Inspection:
    """Describe every layer: its spectrum, EVBMF and break-even ranks, methods that fit, reasons.

    Nothing is run and nothing is written.

    Parameters
    ----------
    model : path, bytes or ModelProto
    method, include, exclude, progress
        As for ``optimize``.
    batch, shape
        The sizes for which MACs are counted; without them, the first that are possible.

    Returns
    -------
    Inspection
        A tuple with a row for each layer. Its ``widths`` are the channels between layers: the
        layers that write, carry and read them, and why some can't be narrowed.

    Raises
    ------
    OnnxlrError
        If the model can't be used, or the arguments make no sense.

    Examples
    --------
    >>> rows = inspect("models/fashion-mlp.onnx")
    >>> [fit.method for fit in rows[0].fits]
    ['svd']
    """
    methods = arguments.as_tuple(method)
    arguments.parse_machine("cpu", 1, batch, 0)
    shapes = arguments.as_tuple(shape)
    return inspect_source(
        load(model), methods, include, exclude, shapes, batch, progress or Silent()
    )


def apply(
    plan: FileName | Plan,
    model: Model,
    out: FileName | None = None,
    *,
    data: SampleData | None = None,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Replay a plan on the model that it was made for: the same bytes again.

    Parameters
    ----------
    plan : path or Plan
    model : path, bytes or ModelProto
    out : path, optional
        Where to write the result, whole or not at all. Without it nothing is written.
    data : path or samples, optional
        The samples that factors were fitted to, if they aren't where they were.
    progress : Progress, optional

    Returns
    -------
    ModelProto
        If the model was written to ``out`` with external data, it comes without them.

    Raises
    ------
    UsageError
        If the plan isn't one, is for another model, or needs a method that isn't installed or
        samples that aren't there.
    """
    plan_path, plan = (None, plan) if isinstance(plan, Plan) else (plan, arguments.read_plan(plan))
    samples = None if plan.calibration is None else plan.calibration.data
    given = as_data(data)
    read = None if isinstance(given, InMemory) else given
    path = model_destination(out, model, plan_path, read, samples)
    source = load(model)
    if path is not None:
        check_external(path, source, path)
    return replay(plan, source, path, given, progress or Silent())
