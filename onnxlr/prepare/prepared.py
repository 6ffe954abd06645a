"""From a source to a prepared model: functions inlined, shapes inferred, layers listed."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.errors import ModelError
from onnxlr.layers.find import find_layers
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import heavy_nodes
from onnxlr.model.constants import constant
from onnxlr.model.load import DataStamps, Source, load
from onnxlr.prepare.batch_norm import fold_batch_norms
from onnxlr.prepare.functions import inline_functions
from onnxlr.prepare.shapes import infer_shapes, observe_shapes
from onnxlr.prepare.synthetic import (
    InputSpec,
    candidate_shapes,
    input_specs,
    parse_shapes,
)
from onnxlr.system.session import ONE_CPU_THREAD, Feed, Machine
from onnxlr.types import Shape


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model ready to be factorized.

    Attributes
    ----------
    source : Source
    model : onnx_ir.Model
        The source's model with its BatchNormalizations folded.
    specs : tuple of InputSpec
    input_shapes : dict
        The static input shapes that MACs and times are for.
    shapes : dict
        Static shapes of the main graph's tensors, as far as known.
    layers : tuple of Layer
    """

    source: Source
    model: ir.Model
    specs: tuple[InputSpec, ...]
    input_shapes: dict[str, Shape]
    shapes: dict[str, Shape]
    layers: tuple[Layer, ...]

    def layer(self, name: str) -> Layer:
        """The layer of this name."""
        return next(layer for layer in self.layers if layer.name == name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as the original and what was found out about it."""
        path, data = self.source.path, self.source.data
        content = path.absolute() if path is not None else np.frombuffer(data or b"", np.uint8)
        known = self.source.digest, self.source.data_stamps
        return _again, (content, known, self.specs, self.input_shapes, self.shapes)


_LATEST: dict[str, Prepared] = {}  # the last model that arrived in this process


def _again(
    content: Path | NDArray[np.uint8],
    known: tuple[str, DataStamps],
    specs: tuple[InputSpec, ...],
    input_shapes: dict[str, Shape],
    shapes: dict[str, Shape],
) -> Prepared:
    digest, _ = known
    found = _LATEST.get(digest)
    if found is None or found.shapes != shapes:
        source = load(
            content if isinstance(content, Path) else content.tobytes(), cached_digest=known
        )
        if source.digest != digest:
            raise ModelError(
                f"{source.label} on {platform.node()} is not the model that this run began with: "
                "leave it as it is while it is being optimized, and give all workers the same"
            )
        model = simplified_model(source)
        layers = find_layers(model, shapes)
        found = Prepared(source, model, specs, input_shapes, shapes, layers)
        _LATEST.clear()
        _LATEST[digest] = found
    return found


def simplified_model(source: Source) -> ir.Model:
    """The source's model with its functions inlined and its BatchNormalizations folded."""
    model = inline_functions(source.model.clone())
    fold_batch_norms(model)
    return model


def prepare(
    source: Source,
    *,
    feed: Feed | None,
    machine: Machine = ONE_CPU_THREAD,
    shapes: Sequence[str] = (),
    batch: int = 1,
) -> Prepared:
    """Fold, infer shapes and find the layers.

    Parameters
    ----------
    source : Source
    feed : feed or None
        A feed that the model is known to run on. Without one, nothing is run: the first sizes
        worth trying are taken, and shapes that inference doesn't find stay unknown.
    """
    model = simplified_model(source)
    specs = input_specs(model)
    if feed is not None:
        input_shapes = {name: tuple(a.shape) for name, a in feed.items()}
    else:
        given = parse_shapes(shapes, specs)
        input_shapes = next(iter(candidate_shapes(specs, given, batch)))
    known = infer_shapes(model, input_shapes)
    layers = find_layers(model, known)
    values = [v for node in heavy_nodes(model) for v in (*node.inputs[:2], node.outputs[0])]
    values += [
        v
        for layer in layers
        for use in layer.uses
        if use.node.graph is model.graph
        for v in (use.x, use.node.outputs[0])
    ]
    unknown = [
        v.name or ""
        for v in values
        if v is not None and v.name not in known and constant(v) is None
    ]
    if unknown and feed is not None:
        known |= observe_shapes(model, unknown, feed, machine, source.folder)
        layers = find_layers(model, known)
    return Prepared(source, model, specs, input_shapes, known, layers)
