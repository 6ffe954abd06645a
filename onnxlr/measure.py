"""The public functions that measure models as they are: two side by side, or latency alone."""

from collections.abc import Sequence
from dataclasses import replace

from onnxlr import api, arguments
from onnxlr.arguments import Model
from onnxlr.comparison import Benchmark, ModelComparison, bench_models, compare_models
from onnxlr.progress import Progress, Silent
from onnxlr.system.in_memory import SampleData, as_data
from onnxlr.system.session import Provider


def compare(
    a: Model,
    b: Model,
    *,
    data: SampleData | None = None,
    labels: str | None = None,
    metric: str | None = None,
    provider: Provider = "cpu",
    threads: int = 1,
    batch: int = 1,
    shape: str | Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelComparison:
    """Compare B with A: fidelity, the metric of both, sizes, MACs, and speed in turn in one run.

    Parameters
    ----------
    a, b : path, bytes or ModelProto
    data : path or samples in memory, optional
        Samples, all of which judge; synthetic inputs do without.
    labels, metric, provider, threads, batch, shape, seed, progress
        As for ``optimize``.

    Raises
    ------
    OnnxlrError
        If one of them can't be read or run, or their inputs and outputs differ.
    """
    return compare_models(
        a,
        b,
        arguments.parse_machine(provider, threads, batch, seed),
        data=as_data(data),
        labels=labels,
        metric=metric,
        shapes=arguments.as_tuple(shape),
        batch=batch,
        limits=api.LIMITS,
        seed=seed,
        progress=progress or Silent(),
    )


def bench(
    a: Model,
    b: Model | None = None,
    *,
    data: SampleData | None = None,
    provider: Provider = "cpu",
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
        Samples to time on; synthetic inputs are used without.
    provider, threads, batch, shape, seed, progress
        As for ``optimize``.
    seconds : float
        Rough length of the run.

    Raises
    ------
    OnnxlrError
        If one of them can't be read or run, or B doesn't run on the inputs of A.
    """
    machine = arguments.parse_machine(provider, threads, batch, seed)
    arguments.check_seconds(seconds)
    return bench_models(
        a,
        b,
        machine,
        data=as_data(data),
        shapes=arguments.as_tuple(shape),
        batch=batch,
        limits=replace(api.LIMITS, timing_seconds=seconds, timing_seconds_least=seconds),
        seed=seed,
        progress=progress or Silent(),
    )
