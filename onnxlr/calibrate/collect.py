"""The mean and the covariance of each layer's inputs on the calibration samples.

The error of an approximation W̃ of a layer y = W·x with a free bias is exactly
tr((W − W̃)·C·(W − W̃)ᵀ), C the covariance of x: that is what factors are fitted to. Where x has too
many elements for that, a sample of its rows and the covariance of y take the place of C.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from onnxlr.calibrate.sampling import Values
from onnxlr.calibrate.statistics import (
    WIDEST,
    RunningMoments,
    Statistics,
    is_wide,
    merge_statistics,
    weight_only_reason,
)
from onnxlr.calibrate.wide import (
    Lookups,
    WideMoments,
    centred,
    gives_product,
    rows_to_sample,
    watched,
)
from onnxlr.errors import ModelError
from onnxlr.layers.kernel import matrix_sides
from onnxlr.layers.layer import Layer, Use
from onnxlr.limits import SAMPLED_BYTES
from onnxlr.model.constants import constant
from onnxlr.prepare.opening import lifted_name, session_of_values
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Progress
from onnxlr.system.pool import Pool
from onnxlr.system.session import Machine

_MOST_SHARDS, _RUNS_A_SHARD = 8, 32  # shards of the samples; each opens the model anew
_OUTPUT_BYTES = 256 << 20  # bytes of activations that one run may return
_LEAST_OUTPUT_BYTES = 1 << 20  # below this, fewer layers at once won't help
_UNKNOWN = 8  # layers whose inputs are of unknown size that are looked at at once
_Shard = tuple[list[str], int, int, int, int, Machine]  # what ``shard_statistics`` takes last


def calibrate(
    prepared: Prepared,
    layers: Sequence[Layer],
    samples: Samples,
    machine: Machine,
    seed: int,
    progress: Progress,
    pool: Pool,
) -> dict[str, Statistics]:
    """Statistics of the inputs of layers: the samples run through the model once a batch of layers.

    Shards of the samples run side by side. Which samples are in a shard depends on their number
    alone, and statistics are merged in the order of the shards: however many processes there are,
    the result is the same to the bit. Only sums stay in memory, nothing for each sample.

    Parameters
    ----------
    prepared : Prepared
    layers : sequence of Layer
        Those that have a ``weight_only_reason`` are left out.
    samples : Samples
    machine : Machine
    seed : int
        Seed of the positions that are sampled.
    progress : Progress
    pool : Pool
        The processes that share the shards.

    Returns
    -------
    dict of str to Statistics
        By layer name. A layer with fewer than two rows of inputs is absent.
    """
    layers = [layer for layer in layers if weight_only_reason(layer) is None]
    # Values of bodies may be of another size in each iteration: then they can't be had.
    inner = [layer for layer in layers if _is_inner(layer)]
    outer = [layer for layer in layers if not _is_inner(layer)]
    runs = samples.runs
    count = min(_MOST_SHARDS, max(1, runs // _RUNS_A_SHARD))
    bounds = [runs * i // count for i in range(count + 1)]
    output_bytes = _OUTPUT_BYTES
    while True:
        batches = [*_batches(outer, output_bytes), *_batches(inner, output_bytes)]
        shards: list[_Shard] = [
            ([layer.name for layer in batch], first, last, runs, seed, machine)
            for batch in batches
            for first, last in itertools.pairwise(bounds)
        ]
        try:
            return _merged_statistics(prepared, samples, shards, progress, pool)
        except MemoryError:
            if output_bytes < _LEAST_OUTPUT_BYTES:
                raise
            output_bytes //= 8  # fewer layers at once, in more passes over the samples


def _merged_statistics(
    prepared: Prepared,
    samples: Samples,
    shards: Sequence[_Shard],
    progress: Progress,
    pool: Pool,
) -> dict[str, Statistics]:
    """The statistics of each layer's inputs, merged from those of the shards."""
    statistics: dict[str, Statistics] = {}
    needs = 6 * prepared.source.nbytes + max(
        (sum(_statistics_bytes(prepared.layer(n)) for n in names) for names, *_ in shards),
        default=0,
    )
    with progress.stage("calibrate", len(shards)) as step:
        results = pool.map(shard_statistics, shards, prepared, samples, needs=needs)
        for (names, *_), part in zip(shards, results, strict=True):
            for name, item in part.items():
                earlier = statistics.get(name)
                statistics[name] = item if earlier is None else merge_statistics(earlier, item)
            step(f"{len(names)} layers")
    return {name: centred(item) for name, item in statistics.items() if item.rows > 1}


def shard_statistics(
    prepared: Prepared,
    samples: Samples,
    names: Sequence[str],
    first: int,
    last: int,
    runs: int,
    seed: int,
    machine: Machine,
) -> dict[str, Statistics]:
    """Statistics of some layers' inputs over a shard of the samples: runs ``first`` to ``last``.

    ``runs`` is the number of runs in all shards. Layers whose inputs are empty are absent.
    """
    layers = [prepared.layer(name) for name in names]
    moments = {layer.name: _moments(prepared, layer, first, runs, seed + first) for layer in layers}
    graph = prepared.model.graph
    outer, inner = set[str](), dict[str, ir.DataType]()
    for layer in layers:
        for use, value in watched(layer):
            if value.graph is graph:
                outer.add(value.name or "")
            else:
                looked_up = layer.kind == "gather" and value is use.x
                usual = ir.DataType.INT64 if looked_up else use.dtype
                inner[value.name or ""] = value.dtype or usual
    session = session_of_values(prepared.model, outer, machine, prepared.source, inner)
    for feed, _, _ in itertools.islice(samples.batches(), first, last):
        try:
            values = dict(feed) | session.run(feed)
        except ModelError:
            if not inner:
                raise
            return {}
        for layer in layers:
            for use in layer.uses:
                _add(moments[layer.name], use, values, graph)
    return {name: item.statistics() for name, item in moments.items() if item.rows}


def _add(
    item: RunningMoments | WideMoments | Lookups,
    use: Use,
    values: Mapping[str, Values],
    graph: ir.Graph,
) -> None:
    """Add what a user was given in one run, and what it gave."""

    def seen(value: ir.Value) -> Values | None:
        tensor = constant(value)
        if tensor is not None:
            return tensor.numpy()
        name = value.name or ""
        return values.get(name if value.graph is graph else lifted_name(name))

    x = seen(use.x)
    if x is None:
        return
    if isinstance(item, WideMoments):
        item.add(use, x, seen(use.node.outputs[0]))
    elif isinstance(item, Lookups):
        item.add(x)
    else:
        item.add(use, x)


def _is_inner(layer: Layer) -> bool:
    return any(use.inner for use in layer.uses)


def _moments(
    prepared: Prepared, layer: Layer, first: int, runs: int, seed: int
) -> RunningMoments | WideMoments | Lookups:
    """What collects the statistics of a layer, from the first of some runs on."""
    if layer.kind == "gather":
        return Lookups(layer)
    if not is_wide(layer):
        return RunningMoments(layer, runs, seed)
    layers = sum(weight_only_reason(item) is None and is_wide(item) for item in prepared.layers)
    return WideMoments(layer, rows_to_sample(layer, layers), first, runs, seed)


def _statistics_bytes(layer: Layer) -> int:
    """Bytes of a layer's moments, in the sums and in the statistics."""
    groups, m, n = matrix_sides(layer)
    if layer.kind == "gather":
        return 16 * n
    if is_wide(layer):
        return 2 * SAMPLED_BYTES + 16 * min(groups * m**2, WIDEST**2)
    return 16 * groups * n**2


def _batches(layers: Sequence[Layer], most: int) -> Iterable[list[Layer]]:
    """Layers in batches that expose at most so many bytes in a run; one layer may take more."""
    batch: list[Layer] = []
    size = 0
    for layer in layers:
        shapes = [use.x_shape or () for use in layer.uses]
        if is_wide(layer) and gives_product(layer):
            shapes += [use.y_shape or () for use in layer.uses]
        nbytes = sum(4 * math.prod(shape) for shape in shapes)
        if any(use.x_shape is None for use in layer.uses):  # in a body, say
            nbytes = max(nbytes, most // _UNKNOWN)
        if batch and size + nbytes > most:
            yield batch
            batch, size = [], 0
        batch.append(layer)
        size += nbytes
    if batch:
        yield batch
