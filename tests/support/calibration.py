"""Statistics of a model's layers on some feeds, and what the layers give, for tests."""

from collections.abc import Sequence

import numpy as np
import onnx

from onnxlr.calibrate.collect import calibrate
from onnxlr.calibrate.statistics import Statistics
from onnxlr.layers.layer import Layer
from onnxlr.model.load import load
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Silent
from onnxlr.system.pool import Pool
from onnxlr.system.session import ONE_CPU_THREAD, Feed
from tests.support.builders import Array, run


def prepared_of(model: onnx.ModelProto, rows: int = 6) -> tuple[Prepared, list[Feed]]:
    """The model and feeds whose mean isn't zero and whose parts go together."""
    rng = np.random.default_rng(0)
    feeds: list[Feed] = []
    for _ in range(rows):
        feed = {}
        for v in model.graph.input:
            shape = [d.dim_value for d in v.type.tensor_type.shape.dim]
            x = rng.standard_normal(shape) + 0.5 * rng.standard_normal(shape[-1]) + 1.0
            feed[v.name] = np.cumsum(x, axis=-1).astype(np.float32)
        feeds.append(feed)
    return prepare(load(model), feed=feeds[0]), feeds


def calibrated(
    prepared: Prepared, layers: Sequence[Layer], feeds: list[Feed]
) -> dict[str, Statistics]:
    """Statistics on some feeds, each of them one sample."""
    parts = tuple({name: array[None] for name, array in feed.items()} for feed in feeds)
    samples = Samples("feeds", parts, None, np.arange(len(feeds)), prepared.specs)
    return calibrate(prepared, layers, samples, ONE_CPU_THREAD, 0, Silent(), Pool(1))


def outputs(model: onnx.ModelProto, feeds: list[Feed]) -> list[Array]:
    return [run(model, feed)[0].astype(np.float64) for feed in feeds]


def by_channel(layer: Layer, arrays: list[Array]) -> Array:
    """Outputs as (channels, everything else)."""
    if layer.kind == "matrix" and len(layer.shape) > 2:  # of a stack each matrix has its own
        axis = -2 if layer.uses[0].slot == 0 else -1
        sides = arrays[0].shape[-3] * arrays[0].shape[axis]
        moved = [np.moveaxis(a, (-3, axis), (0, 1)).reshape(sides, -1) for a in arrays]
        return np.concatenate(moved, axis=1)
    left = layer.kind == "matrix" and layer.uses[0].slot == 0
    axis = 1 if layer.convolves else -2 if left else -1
    moved = [np.moveaxis(a, axis, 0) for a in arrays]
    return np.concatenate([m.reshape(len(m), -1) for m in moved], axis=1)


def without_bias(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for item in bare.graph.node:
        del item.input[2:]
    return bare
