"""What each layer is given on the calibration data: the mean and the covariance of its inputs.

The error of an approximation W̃ of a layer y = W·x with a free bias is exactly
tr((W − W̃)·C·(W − W̃)ᵀ), C the covariance of x: that is what factors are fitted to.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

from onnxlr.calibrate.statistics import (
    RunningMoments,
    Statistics,
    input_size,
    together,
    weight_only_reason,
)
from onnxlr.layers.layer import Layer
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.prepare.sessions import session_with_outputs
from onnxlr.progress import Progress
from onnxlr.system.pool import Pool
from onnxlr.system.session import Machine

_MOST_SHARDS, _RUNS_A_SHARD = 8, 32  # of the data; a model is opened anew for each
_LEAST_EXPOSED = 1 << 20  # below this, fewer at once won't help
_EXPOSED = 256 << 20  # bytes of activations that one run may give out
_Item = tuple[list[str], int, int, int, int, Machine]  # what ``moments`` takes beside the model


def calibrate(
    prepared: Prepared,
    layers: Sequence[Layer],
    samples: Samples,
    machine: Machine,
    seed: int,
    progress: Progress,
    pool: Pool,
) -> dict[str, Statistics]:
    """Stream the data through the model once for each batch of layers; nothing is held a sample.

    Shards of the data are looked at side by side. Which samples a shard holds depends on their
    number alone, and their moments are put together in its order: however many processes there are,
    the result is the same to the bit.

    Parameters
    ----------
    prepared : Prepared
    layers : sequence of Layer
        Those whose inputs are to be looked at; the ones that ``weight_only_reason`` speaks of are left out.
    samples : Samples
    machine : Machine
    seed : int
        Of the positions that are sampled.

    Returns
    -------
    dict of str to Statistics
        By layer name.
    """
    wanted = [layer for layer in layers if weight_only_reason(layer) is None]
    runs = samples.runs
    shards = min(_MOST_SHARDS, max(1, runs // _RUNS_A_SHARD))
    bounds = [runs * i // shards for i in range(shards + 1)]
    exposed_bytes = _EXPOSED
    while True:
        items: list[_Item] = [
            ([layer.name for layer in batch], first, last, runs, seed, machine)
            for batch in _batches(wanted, exposed_bytes)
            for first, last in itertools.pairwise(bounds)
        ]
        try:
            return _calibrated(prepared, samples, items, progress, pool)
        except MemoryError:
            if exposed_bytes < _LEAST_EXPOSED:
                raise
            exposed_bytes //= 8  # fewer layers at once, in more passes over the data


def _calibrated(
    prepared: Prepared,
    samples: Samples,
    items: Sequence[_Item],
    progress: Progress,
    pool: Pool,
) -> dict[str, Statistics]:
    """The moments of each layer's inputs, put together from those of the shards."""
    found: dict[str, Statistics] = {}
    needs = 6 * prepared.source.nbytes + max(
        (sum(_covariance_bytes(prepared.layer(n)) for n in names) for names, *_ in items), default=0
    )
    with progress.stage("calibrate", len(items)) as step:
        results = pool.map(moments, items, prepared, samples, needs=needs)
        for (names, *_), part in zip(items, results, strict=True):
            for name, item in part.items():
                found[name] = together(found[name], item) if name in found else item
            step(f"{len(names)} layers")
    return {name: item for name, item in found.items() if item.rows > 1}


def moments(
    prepared: Prepared,
    samples: Samples,
    names: Sequence[str],
    first: int,
    last: int,
    runs: int,
    seed: int,
    machine: Machine,
) -> dict[str, Statistics]:
    """Moments of some layers' inputs over a shard of the samples: runs ``first`` to ``last``."""
    layers = [prepared.layer(name) for name in names]
    sums = {layer.name: RunningMoments(layer, runs, seed + first) for layer in layers}
    inputs = {use.x.name or "" for layer in layers for use in layer.uses}
    session = session_with_outputs(prepared.model, inputs, machine, prepared.source)
    for feed, _, _ in itertools.islice(samples.batches(), first, last):
        values = dict(feed) | session.run(feed)
        for layer in layers:
            for use in layer.uses:
                sums[layer.name].add(use, values[use.x.name or ""])
    return {name: s.statistics() for name, s in sums.items() if s.rows}


def _covariance_bytes(layer: Layer) -> int:
    return 16 * layer.group * input_size(layer) ** 2


def _batches(layers: Sequence[Layer], most: int) -> Iterable[list[Layer]]:
    batch: list[Layer] = []
    size = 0
    for layer in layers:
        own = sum(4 * math.prod(use.x_shape or ()) for use in layer.uses)
        if batch and size + own > most:
            yield batch
            batch, size = [], 0
        batch.append(layer)
        size += own
    if batch:
        yield batch
