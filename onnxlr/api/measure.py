"""The public functions that measure models as they are: two side by side, or latency alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnxlr.api import arguments, functions
from onnxlr.api.arguments import FileName
from onnxlr.jobs.comparison import Benchmark, Bounds, ModelComparison, bench_models, compare_models
from onnxlr.jobs.headline import comparison_markdown
from onnxlr.model.destinations import check_destination
from onnxlr.model.load import Model
from onnxlr.progress import Progress, Silent
from onnxlr.system.files import write_text
from onnxlr.system.in_memory import SampleData, as_data


def compare(
    a: Model,
    b: Model,
    *,
    data: SampleData | None = None,
    labels: str | None = None,
    metric: str | None = None,
    provider: str | Sequence[str] = "cpu",
    provider_option: str | Sequence[str] = (),
    provider_library: str | Sequence[str] = (),
    threads: int = 1,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    seed: int = 0,
    max_drop: float | None = None,
    max_slowdown: float | None = None,
    markdown: FileName | None = None,
    progress: Progress | None = None,
) -> ModelComparison:
    """Compare B with A: fidelity, the metric of both, sizes, MACs, and speed in turn in one run.

    Parameters
    ----------
    a, b : path, bytes or ModelProto
    data : path or samples in memory, optional
        Samples, all of which are compared on; without them, inputs are synthetic.
    labels, metric, provider, provider_option, provider_library, threads, batch, shape, seed,
    progress
        As for ``optimize``.
    max_drop : float, optional
        Largest loss of the metric that is allowed: a larger one is named in ``violations``.
    max_slowdown : float, optional
        Largest share of A's time that B may take longer: 0.05 is 5%. More is named there too.
    markdown : path, optional
        Where the comparison is written as Markdown, as for the summary of a step in CI.

    Returns
    -------
    ModelComparison
        Quality, fidelity, sizes, MACs and speed of both, and ``violations`` of the limits.

    Raises
    ------
    OnnxlrError
        If one of them can't be read or run, their inputs and outputs differ, or the file can't be
        written.
    """
    machine = arguments.parse_machine(
        *(provider, threads, batch, seed), options=provider_option, libraries=provider_library
    )
    arguments.check_slowdown(max_slowdown)
    loss = arguments.parse_max_drop(max_drop)
    bounds = Bounds(loss if loss != math.inf else None, max_slowdown)
    page = None if markdown is None else Path(markdown)
    if page is not None:
        check_destination(page, *map(arguments.path_of, (a, b)))
    result = compare_models(
        a,
        b,
        machine,
        data=as_data(data),
        labels=labels,
        metric=metric,
        shapes=arguments.as_tuple(shape),
        batch=batch,
        limits=functions.LIMITS,
        seed=seed,
        bounds=bounds,
        progress=progress or Silent(),
    )
    if page is not None:
        write_text(page, comparison_markdown(result))
    return result


def bench(
    a: Model,
    b: Model | None = None,
    *,
    data: SampleData | None = None,
    provider: str | Sequence[str] = "cpu",
    provider_option: str | Sequence[str] = (),
    provider_library: str | Sequence[str] = (),
    threads: int = 1,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    seconds: float = 5.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure the latency on ONNX Runtime of one model, or of two in turn in one run.

    Parameters
    ----------
    a, b : path, bytes or ModelProto
    data : path or samples in memory, optional
        Samples to time on; without them, inputs are synthetic.
    provider, provider_option, provider_library, threads, batch, shape, seed, progress
        As for ``optimize``.
    seconds : float
        Rough length of the run.

    Returns
    -------
    Benchmark
        Milliseconds of one run of each model; of two models also the ratio, with its interval.

    Raises
    ------
    OnnxlrError
        If one of them can't be read or run, or B doesn't run on the inputs of A.
    """
    machine = arguments.parse_machine(
        *(provider, threads, batch, seed), options=provider_option, libraries=provider_library
    )
    arguments.check_seconds(seconds)
    return bench_models(
        a,
        b,
        machine,
        data=as_data(data),
        shapes=arguments.as_tuple(shape),
        batch=batch,
        limits=replace(functions.LIMITS, timing_seconds=seconds, timing_seconds_least=seconds),
        seed=seed,
        progress=progress or Silent(),
    )
