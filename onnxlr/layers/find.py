"""Finding the layers of a model: every constant weight of a heavy operator, with all its users."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxlr.layers.axes import axis_counts
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.macs import is_fixed, shape_of
from onnxlr.layers.operators import FLOATS, MICROSOFT, QUANTIZED, STANDARD, Kind
from onnxlr.layers.tracing import Trace, foreign_user, trace
from onnxlr.model.attributes import int_attr, ints_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard
from onnxlr.types import Shape, Shapes

_LARGEST = 1e100  # of a weight's values: squares, and sums of them, stay in range


@dataclass(frozen=True, eq=False)
class _Sighting:
    """A weight as one node's input: where it is stored, and what lies between."""

    use: Use
    kind: Kind
    seen: Trace


def find_layers(model: ir.Model, shapes: Shapes) -> tuple[Layer, ...]:
    """Every layer of a model, in graph order, those that can't be factorized with their reason.

    Subgraph bodies and local functions are searched too.

    Parameters
    ----------
    model : onnx_ir.Model
    shapes : mapping of str to tuple of int
        Static shapes of the main graph's tensors, as far as known.
    """
    axes = axis_counts(model.graph)
    found: dict[ir.Value, list[_Sighting]] = {}
    places: dict[ir.Value, str] = {}
    for place, node in _nodes(model):
        for sighting in _sightings(node, model.graph, shapes, axes):
            found.setdefault(sighting.seen.root, []).append(sighting)
            if place:
                places.setdefault(sighting.seen.root, place)
    layers = [_layer(root, s, places.get(root)) for root, s in found.items()]
    return tuple(
        replace(layer, name=name) for layer, name in zip(layers, _unique_names(layers), strict=True)
    )


def _unique_names(layers: Sequence[Layer]) -> list[str]:
    """The first user's name; the weight's where that has none or shares it; then numbered."""
    users = Counter(layer.name for layer in layers)
    names: dict[str, None] = {}
    for layer in layers:
        own = bool(layer.name) and users[layer.name] == 1
        stem = layer.name if own else layer.weight.name or "weight"
        name, i = stem, 1
        while name in names or (not own and users[name] == 1):
            name, i = f"{stem}_{i}", i + 1
        names[name] = None
    return list(names)


def _nodes(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Every node, those of local functions with the words for where they are."""
    for node in model.graph.all_nodes():
        yield "", node
    for function in model.functions.values():
        for inner in function.all_nodes():
            yield f"in the local function {function.name!r}", inner


def _sightings(
    node: ir.Node, graph: ir.Graph, shapes: Shapes, axes: Mapping[ir.Value, int]
) -> Iterator[_Sighting]:
    if is_standard(node, *STANDARD):
        slots, kind = STANDARD[node.op_type]
    elif node.domain == "com.microsoft" and node.op_type in MICROSOFT:
        slots, kind = MICROSOFT[node.op_type]
    else:
        return
    traced = [(s, trace(node.inputs[s])) for s in slots if s < len(node.inputs)]
    weights = [(s, t) for s, t in traced if t is not None]
    if kind == "matrix" and len(weights) > 1:
        weights = [(s, t) for s, t in weights if is_fixed(t)]
        if len(weights) != 1:
            return  # constant times constant: nothing runs through it
    for slot, seen in weights:
        if kind == "gather" and not _embeds(seen):
            continue  # shapes and indices, not an embedding
        use = Use(node, slot, False, seen.dtype or ir.DataType.UNDEFINED, None, None, None, None)
        x = shape_of(use.x, graph, shapes) if node.inputs and node.inputs[0] is not None else None
        y = node.outputs[0]
        use = replace(
            use,
            x_shape=x,
            y_shape=shape_of(y, graph, shapes),
            x_axes=axes.get(use.x),
            y_axes=axes.get(y),
        )
        yield _Sighting(use, kind, seen)


def _embeds(seen: Trace) -> bool:
    """Whether what a Gather looks up in is a table of features, quantized or not."""
    tensor = constant(seen.root)
    if tensor is None or len(tensor.shape) < 2:
        return False
    if seen.quantized:
        return True
    kind = seen.dtype
    return kind is not None and (kind.is_floating_point() or kind in QUANTIZED)


def _layer(root: ir.Value, sightings: list[_Sighting], place: str | None) -> Layer:
    first = sightings[0]
    tensor = constant(root)
    assert tensor is not None
    stored = tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    perm = first.seen.perm
    uses = []
    reason = next((s.seen.reason for s in sightings if s.seen.reason), None)
    if first.kind == "recurrent":
        reason = reason or f"no method replaces the weights of {first.use.node.op_type}"
    for s in sightings:
        swapped = s.seen.perm != perm
        if swapped and s.seen.perm != _swap_last(perm):
            reason = reason or "its users see it in layouts that no one factorization serves"
        uses.append(replace(s.use, swapped=swapped))
    shape = tuple(stored[i] for i in perm) if perm else stored
    layer = Layer(
        first.use.node.name or "",
        first.use.node.op_type,
        first.kind,
        root,
        shape,
        tensor.dtype,
        tuple(uses),
        None,
        None,
        None if perm in ((), tuple(range(len(perm)))) else perm,
    )
    weight_refusal = _lock(layer, tensor, sightings, place)
    return replace(
        layer,
        weight_refusal=weight_refusal,
        refusal=weight_refusal or reason or _refusal(layer, sightings),
    )


def _swap_last(perm: Shape) -> Shape:
    return (*perm[:-2], perm[-1], perm[-2]) if len(perm) > 1 else perm


def _lock(
    layer: Layer, tensor: ir.TensorProtocol, sightings: list[_Sighting], place: str | None
) -> str | None:
    """Why the stored weight must stay as it is, whatever the method."""
    if layer.kind == "quantized":
        return f"{layer.op} is already quantized: left alone"
    if any(s.seen.quantized for s in sightings):
        return next(s.seen.reason for s in sightings if s.seen.quantized)
    if layer.dtype in QUANTIZED:
        return f"the weight is quantized (stored as {layer.dtype.name.lower()}): left alone"
    if layer.dtype not in FLOATS:
        computed = next((s.seen.reason for s in sightings if s.seen.reason), None)
        return computed or f"the weight is stored as {layer.dtype.name.lower()}: left alone"
    if 0 in layer.shape:
        return f"the weight is empty (shape {layer.shape})"
    if layer.dtype == ir.DataType.DOUBLE:
        values = np.abs(np.asarray(tensor.numpy()))
        largest = float(values.max(initial=0.0, where=np.isfinite(values)))
        if largest > _LARGEST:
            return f"the weight's values reach {largest:.0e}, and their squares beyond all numbers"
    if place is not None:
        return f"{place}, which can't be inlined"
    if layer.weight.is_graph_output():
        return "the weight is also an output of the graph"
    return None


def _refusal(layer: Layer, sightings: list[_Sighting]) -> str | None:
    """Why no chain can replace the layer, whatever the method."""
    if any(s.use.dtype not in FLOATS for s in sightings):
        return "its users cast it to something other than floating point"
    kinds = {s.kind for s in sightings}
    if len(kinds) > 1:
        ops = ", ".join(dict.fromkeys(s.use.node.op_type for s in sightings))
        return f"shared by {ops}, which no one factorization serves"
    if layer.convolves:
        if len({int_attr(s.use.node, "group", 1) for s in sightings}) > 1:
            return "its users have different groups"
        if any(use.swapped for use in layer.uses):
            return "its users see it in layouts that no one factorization serves"
        if len(layer.shape) < 3 or layer.group < 1 or layer.shape[0] % layer.group:
            return f"shape {layer.shape} in {layer.group} groups is no convolution kernel"
        if misfits := [m for s in sightings for m in _odd_attributes(s.use.node, layer.shape[2:])]:
            return misfits[0]
    known = {(s.use.node, s.use.slot) for s in sightings}
    return foreign_user(layer.weight, known)


def _odd_attributes(node: ir.Node, kernel: Shape) -> Iterator[str]:
    """What makes no sense of a convolution's attributes, for a kernel of these sizes."""
    for name, each, least in (
        *(("strides", 1, 1), ("dilations", 1, 1), ("pads", 2, 0), ("kernel_shape", 1, 1)),
        *(("output_padding", 1, 0), ("output_shape", 1, 1)),
    ):
        values = ints_attr(node, name, ())
        misfit = len(values) != each * len(kernel) or not all(least <= v < 2**31 for v in values)
        if values and (misfit or (name == "kernel_shape" and values != kernel)):
            yield f"{name} {list(values)} don't fit a kernel of {list(kernel)}"
