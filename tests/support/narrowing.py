"""Widths of small models narrowed as a run narrows them, without the rest of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxlr.calibrate.collect import calibrate
from onnxlr.courses.channels import WidthOffer, kept_of
from onnxlr.decompose.interpolative import elimination
from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.prepare.samples import Samples, load_samples
from onnxlr.progress import Silent
from onnxlr.system.pool import Pool
from onnxlr.system.session import ONE_CPU_THREAD
from onnxlr.widths.find import Widths
from onnxlr.widths.narrowing import Narrower, moments_for, reader_names, widths_of
from onnxlr.widths.readings import layer_moments, readers_of, reading
from tests.support.builders import Array


@dataclass(frozen=True, eq=False)
class Case:
    """A model with its widths, and what a run knows of them."""

    prepared: Prepared
    widths: Widths
    narrower: Narrower
    offers: tuple[WidthOffer, ...]
    x: Array

    def narrow(self, counts: dict[str, int]) -> onnx.ModelProto:
        """The model where so many channels of some widths stay."""
        kept = kept_of(self.offers, counts)
        model = to_proto(self.narrower.model(kept, self.narrower.solved(kept)))
        onnx.checker.check_model(model, full_check=True)
        return model

    def without_redundant(self) -> tuple[onnx.ModelProto, dict[str, int]]:
        """The model without all channels that change nothing, and how many of each width stay."""
        counts = {o.width.name: o.width.size - o.redundant() for o in self.offers}
        return self.narrow(counts), counts


def narrowing_case(
    model: onnx.ModelProto,
    folder: Path,
    *,
    samples: int = 64,
    data: bool = True,
    exact: bool = True,
) -> Case:
    """What a run would know of a model with one input ``x``, from as many random samples.

    Where only what is exact may go, channels are looked at and no inputs of layers.
    """
    shape = tuple(d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((samples, *shape[1:])).astype(np.float32)
    np.save(folder / "x.npy", x)
    prepared = prepare(load(model), feed={"x": x[: shape[0]]})
    widths = widths_of(prepared)
    seen: Samples | None = None
    statistics = {}
    if data:
        seen = load_samples(folder / "x.npy", prepared.specs, None)
        names = () if exact else reader_names(widths)
        layers = [layer for layer in prepared.layers if layer.name in names]
        pool = Pool(1, 1, folder)
        statistics = calibrate(prepared, layers, seen, ONE_CPU_THREAD, 0, Silent(), pool)
    moments = moments_for(prepared, statistics, seen, 0)
    narrower = Narrower(prepared, widths, statistics, moments, folder, "", {"x": x[: shape[0]]})
    offers = []
    for width in widths.usable:
        readings = []
        for cut, places in readers_of(widths, width):
            name = cut.layer.name
            found = (
                layer_moments(cut, places, statistics[name])
                if name in statistics
                else moments[name, width.name]
            )
            readings.append(reading(cut, places, found, None))
        offers.append(WidthOffer(width, elimination(readings, width.heads)))
    return Case(prepared, widths, narrower, tuple(offers), x[: shape[0]])
