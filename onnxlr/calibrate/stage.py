"""The calibrate stage: what layers are given, from the cache or from the samples."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.budget import calibration_samples
from onnxlr.calibrate.calibration import Calibration
from onnxlr.calibrate.collect import calibrate
from onnxlr.calibrate.influence import influences
from onnxlr.calibrate.statistics import Statistics, input_size, weight_only_reason
from onnxlr.layers.layer import Layer
from onnxlr.options import Options
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Progress
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.pool import Pool
from onnxlr.system.session import ONE_CPU_THREAD


def calibrated(
    prepared: Prepared,
    options: Options,
    feeding: Feeding | None,
    fitted: Sequence[Layer],
    cache: Cache,
    pool: Pool,
    progress: Progress,
) -> tuple[dict[str, Statistics], Calibration | None, str]:
    """What layers are given, the samples it comes from, and a digest of all that factors are of."""
    digest = prepared.source.digest
    # At their numerical ranks factors are exact: inputs could only bring rounding in.
    wanted = options.rank.kind != "exact" and "data" not in options.without
    if feeding is None or feeding.calibration is None or not wanted:
        return {}, None, key_of(digest)
    taken = calibration_samples(prepared, feeding.calibration)
    calibration = Calibration(
        str(options.data),
        feeding.half,
        taken.digest(),
        len(taken),
        options.batch,
        influence="sensitivity" not in options.without,
        layers=tuple(layer.name for layer in fitted),
    )
    key = statistics_key(prepared, calibration, options.seed)
    with _kept_statistics(cache, key, fitted) as statistics:
        missing = [layer for layer in fitted if layer.name not in statistics]
        statistics |= calibrate_on(prepared, missing, taken, options.seed, progress, pool)
    if calibration.influence:
        statistics = with_influence(prepared, statistics)
    return statistics, calibration, key_of(key, calibration.influence)


def statistics_key(prepared: Prepared, calibration: Calibration, seed: int) -> str:
    """What the statistics of layers that are looked at together depend on."""
    return key_of(
        prepared.source.digest, calibration.digest, seed, prepared.input_shapes, calibration.layers
    )


@contextlib.contextmanager
def _kept_statistics(
    cache: Cache, key: str, layers: Sequence[Layer]
) -> Iterator[dict[str, Statistics]]:
    """Statistics that the cache has of these layers; what is added is written back."""
    arrays = cache.read_arrays("statistics", key)
    found = {
        name: Statistics(
            arrays[f"mean {name}"], arrays[f"covariance {name}"], int(arrays[f"rows {name}"])
        )
        for name in (layer.name for layer in layers if _are_statistics(arrays, layer))
    }
    before = len(found)
    yield found
    if len(found) > before:
        for name, item in found.items():
            arrays[f"mean {name}"], arrays[f"covariance {name}"] = item.mean, item.covariance
            arrays[f"rows {name}"] = np.array(item.rows)
        cache.write_arrays("statistics", key, arrays)


def _are_statistics(arrays: Mapping[str, NDArray[Any]], layer: Layer) -> bool:
    """Whether there are arrays for a layer, and they are what its ``Statistics`` are made of."""
    if weight_only_reason(layer) is not None:
        return False
    size = input_size(layer)
    shapes = {"mean": (layer.group, size), "covariance": (layer.group, size, size), "rows": ()}
    for word, shape in shapes.items():
        array = arrays.get(f"{word} {layer.name}")
        kind = "i" if word == "rows" else "f"
        if array is None or array.shape != shape or array.dtype.kind != kind:
            return False
        if not np.isfinite(array).all():
            return False
    return True


def calibrate_on(
    prepared: Prepared,
    layers: Sequence[Layer],
    samples: Samples,
    seed: int,
    progress: Progress,
    pool: Pool,
) -> dict[str, Statistics]:
    """Statistics of these layers; on one CPU thread, so that a replay has the same to the bit."""
    return calibrate(prepared, layers, samples, ONE_CPU_THREAD, seed, progress, pool)


def with_influence(
    prepared: Prepared, statistics: Mapping[str, Statistics]
) -> dict[str, Statistics]:
    """Statistics by which errors of outputs count as the layers behind take them."""
    metrics = influences(prepared)
    return {name: replace(item, metric=metrics.get(name)) for name, item in statistics.items()}
