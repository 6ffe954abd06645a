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
from onnxlr.model.graph import is_standard
from onnxlr.model.load import DataStamps, Source, load
from onnxlr.prepare.batch_norm import fold_batch_norms
from onnxlr.prepare.fold_sizes import KnownSizes, find_sizes, store_sizes
from onnxlr.prepare.fold_weights import fold_weights
from onnxlr.prepare.functions import inline_functions
from onnxlr.prepare.identities import drop_identities
from onnxlr.prepare.inputs import InputSpec, input_specs, parse_shapes
from onnxlr.prepare.plain_products import write_plain_products
from onnxlr.prepare.shapes import infer_shapes, observe_shapes
from onnxlr.prepare.synthetic import candidate_shapes
from onnxlr.system.session import ONE_CPU_THREAD, Feed, Machine
from onnxlr.types import Shape


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model ready to be factorized.

    Attributes
    ----------
    source : Source
    model : onnx_ir.Model
        The source's model with its functions inlined, and sizes, computed weights and
        BatchNormalizations folded.
    specs : tuple of InputSpec
        Its inputs.
    input_shapes : dict of str to tuple of int
        The static input shapes that MACs and times are for.
    shapes : dict of str to tuple of int
        Static shapes of the main graph's tensors; those without one are absent.
    layers : tuple of Layer
        Every constant weight of a heavy operator.
    sizes : mapping of str to ndarray
        The values that the file computes and that are stored in ``model``, by their names.
    """

    source: Source
    model: ir.Model
    specs: tuple[InputSpec, ...]
    input_shapes: dict[str, Shape]
    shapes: dict[str, Shape]
    layers: tuple[Layer, ...]
    sizes: KnownSizes

    def layer(self, name: str) -> Layer:
        """The layer of this name."""
        return next(layer for layer in self.layers if layer.name == name)

    def __reduce__(self) -> tuple[Any, ...]:
        """The model goes to another process as its file or bytes, with the inferred shapes."""
        path, data = self.source.path, self.source.data
        content = path.absolute() if path is not None else np.frombuffer(data or b"", np.uint8)
        digest = self.source.digest, self.source.data_stamps
        known = self.specs, self.input_shapes, self.shapes, self.sizes
        return _restore, (content, digest, *known)


_LATEST: dict[str, Prepared] = {}  # the last model that arrived in this process


def _restore(
    content: Path | NDArray[np.uint8],
    cached_digest: tuple[str, DataStamps],
    specs: tuple[InputSpec, ...],
    input_shapes: dict[str, Shape],
    shapes: dict[str, Shape],
    sizes: KnownSizes,
) -> Prepared:
    """A prepared model that came from another process, prepared again if it isn't the last one.

    Raises
    ------
    ModelError
        If the file isn't the one that the other process read.
    """
    digest, _ = cached_digest
    prepared = _LATEST.get(digest)
    if prepared is None or prepared.shapes != shapes:
        source = load(
            content if isinstance(content, Path) else content.tobytes(),
            cached_digest=cached_digest,
        )
        if source.digest != digest:
            raise ModelError(
                f"{source.label} on {platform.node()} is not the model that this run began with: "
                "leave it as it is while it is being optimized, and give all workers the same"
            )
        model, _ = simplified_model(source, sizes)
        layers = find_layers(model, shapes)
        prepared = Prepared(source, model, specs, input_shapes, shapes, layers, sizes)
        _LATEST.clear()
        _LATEST[digest] = prepared
    return prepared


def simplified_model(
    source: Source, sizes: KnownSizes | None = None
) -> tuple[ir.Model, KnownSizes]:
    """The source's model, functions inlined, sizes, weights and BatchNormalizations folded.

    Beside it are the sizes that were stored; they are found if they aren't given.
    """
    model = inline_functions(source.model.clone()).model
    drop_identities(model)
    if sizes is None:
        sizes = find_sizes(model)
    store_sizes(model, sizes)
    write_plain_products(model)
    fold_weights(model)
    fold_batch_norms(model)
    return model, sizes


def prepare(
    source: Source,
    *,
    feed: Feed | None,
    machine: Machine = ONE_CPU_THREAD,
    shapes: Sequence[str] = (),
    batch: int = 1,
) -> Prepared:
    """Fold sizes, weights and BatchNormalizations, infer shapes and find the layers.

    Parameters
    ----------
    source : Source
    feed : feed or None
        A feed that the model runs on. Without one nothing is run: the inputs have the first sizes
        worth trying, and shapes that inference doesn't tell stay unknown.
    machine : Machine
        Where the model runs, for shapes that inference doesn't tell.
    shapes : sequence of str
        Input shapes as ``--shape`` takes them, which count without a feed.
    batch : int
        Size of dynamic sample axes, which counts without a feed.
    """
    model, sizes = simplified_model(source)
    specs = input_specs(model)
    if feed is not None:
        input_shapes = {name: tuple(a.shape) for name, a in feed.items()}
    else:
        fixed_shapes = parse_shapes(shapes, specs)
        input_shapes = next(iter(candidate_shapes(specs, fixed_shapes, batch)))
    static_shapes = infer_shapes(model, input_shapes)
    layers = find_layers(model, static_shapes)
    values = [v for node in heavy_nodes(model) for v in (*node.inputs[:2], node.outputs[0])]
    values += [
        v
        for layer in layers
        for use in layer.uses
        if use.node.graph is model.graph
        for v in (use.x, use.node.outputs[0])
    ]
    values += [n.outputs[0] for n in model.graph if is_standard(n, "Reshape")]  # of sizes that run
    unknown = [
        v.name or ""
        for v in values
        if v is not None and v.name not in static_shapes and constant(v) is None
    ]
    if unknown and feed is not None:
        static_shapes |= observe_shapes(model, unknown, feed, machine, source.folder)
        layers = find_layers(model, static_shapes)
    return Prepared(source, model, specs, input_shapes, static_shapes, layers, sizes)


def samples_at_once(prepared: Prepared) -> int:
    """Samples of one run of a prepared model."""
    shape = next(iter(prepared.input_shapes.values()), ())
    return max(1, shape[0]) if shape else 1  # an input may be empty
