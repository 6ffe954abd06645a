"""Finding the layers of a model: every constant weight of a heavy operator, with all its users."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxlr.layers.axes import axis_counts
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.names import layer_names
from onnxlr.layers.operators import (
    FLOATS,
    QUANTIZED,
    RECURRENT,
    Kind,
    kind_of_slot,
    weight_slots,
)
from onnxlr.layers.shapes import shape_of
from onnxlr.layers.siblings import with_siblings
from onnxlr.layers.tracing import Trace, foreign_user, is_fixed, is_large_matrix, is_view, trace
from onnxlr.model.attributes import int_attr, ints_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard
from onnxlr.types import Shape, Shapes

_LARGEST = 1e100  # value of a weight up to which squares, and sums of them, stay in range


@dataclass(frozen=True, eq=False)
class _WeightInput:
    """An input of a node that leads back to a stored constant, its weight."""

    use: Use
    kind: Kind
    trace: Trace


def find_layers(model: ir.Model, shapes: Shapes) -> tuple[Layer, ...]:
    """Every layer of a model, in graph order; those that can't be factorized have their reason.

    The nodes of subgraph bodies and of local functions count too. So do large matrices of real
    numbers that any other operator reads, which no method replaces.

    Parameters
    ----------
    model : onnx_ir.Model
    shapes : mapping of str to tuple of int
        Static shapes of the main graph's tensors; those without one are absent.
    """
    axes = axis_counts(model.graph)
    inputs: dict[ir.Value, list[_WeightInput]] = {}
    others: dict[ir.Value, list[_WeightInput]] = {}
    places: dict[ir.Value, str] = {}
    order: dict[ir.Value, int] = {}
    for i, (place, node) in enumerate(_nodes(model)):
        found = [*_weight_inputs(node, model.graph, shapes, axes)]
        unlisted = [*_other_inputs(node, {item.use.slot for item in found})]
        for items, by_root in ((found, inputs), (unlisted, others)):
            for item in items:
                by_root.setdefault(item.trace.root, []).append(item)
                order.setdefault(item.trace.root, i)
                if place:
                    places.setdefault(item.trace.root, place)
    for root in others.keys() - inputs.keys():
        inputs[root] = others[root]
    roots = sorted(inputs, key=lambda root: order[root])
    layers = [_layer(root, inputs[root], places.get(root)) for root in roots]
    names = layer_names(layers)
    return with_siblings([replace(a, name=name) for a, name in zip(layers, names, strict=True)])


def _nodes(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Every node after the words for where it is, which are empty outside of local functions."""
    for node in model.graph.all_nodes():
        yield "", node
    for function in model.functions.values():
        for inner in function.all_nodes():
            yield f"in the local function {function.name!r}", inner


def _weight_inputs(
    node: ir.Node, graph: ir.Graph, shapes: Shapes, axes: Mapping[ir.Value, int]
) -> Iterator[_WeightInput]:
    """The inputs of a node that are weights, whether they can be replaced or not."""
    slots, kind = weight_slots(node)
    traces = [(s, trace(node.inputs[s])) for s in slots if s < len(node.inputs)]
    weights = [(s, t) for s, t in traces if t is not None]
    if kind == "matrix" and len(weights) > 1:
        weights = [(s, t) for s, t in weights if is_fixed(t)]
        if len(weights) != 1:
            return  # constant times constant: nothing runs through it
    for slot, origin in weights:
        if kind == "gather" and not _is_embedding(origin):
            continue  # shapes and indices, not an embedding
        use = Use(node, slot, False, origin.dtype or ir.DataType.UNDEFINED, None, None, None, None)
        present = bool(node.inputs) and node.inputs[0] is not None
        x = shape_of(use.x, graph, shapes) if present else None
        y = node.outputs[0]
        use = replace(
            use,
            x_shape=x,
            y_shape=shape_of(y, graph, shapes),
            x_axes=axes.get(use.x),
            y_axes=axes.get(y),
            inner=present and use.x.graph is not graph and constant(use.x) is None,
        )
        yield _WeightInput(use, kind_of_slot(kind, slot), origin)


def _other_inputs(node: ir.Node, listed: set[int]) -> Iterator[_WeightInput]:
    """The inputs of a node that are large matrices, though not known as its weights."""
    if is_view(node):
        return  # asked first: in a long row of views each would be followed to the beginning
    slots = [
        (slot, value)
        for slot, value in enumerate(node.inputs)
        if value is not None and slot not in listed and is_large_matrix(value)
    ]
    if not slots or all(v is None or trace(v) for v in node.inputs):
        return  # a session computes with constants alone when it loads
    for slot, value in slots:
        origin = trace(value)
        if origin is not None and origin.dtype is not None:
            none = (None, None, None, None)
            yield _WeightInput(Use(node, slot, False, origin.dtype, *none), "other", origin)


def fed_weights(model: ir.Model) -> list[str]:
    """Names of inputs without a value that layers would multiply by, or look up in."""
    fed: dict[str, None] = {}
    for node in model.graph:
        slots, kind = weight_slots(node)
        if kind not in ("matrix", "conv", "conv-transpose", "gather", "recurrent"):
            continue
        for slot in [max(slots)] if kind == "matrix" else slots:
            value = node.inputs[slot] if slot < len(node.inputs) else None
            while value is not None and (view := value.producer()) is not None and is_view(view):
                value = view.inputs[0]
            if value is None or not value.is_graph_input() or constant(value) is not None:
                continue
            shape = value.shape
            if shape is not None and len(shape) > 1 and all(isinstance(d, int) for d in shape):
                fed[value.name or ""] = None
    return list(fed)


def _is_embedding(origin: Trace) -> bool:
    """Whether what a Gather looks up in is a table of features, quantized or not."""
    tensor = constant(origin.root)
    if tensor is None or len(tensor.shape) < 2:
        return False
    if origin.quantized:
        return True
    dtype = origin.dtype
    return dtype is not None and (dtype.is_floating_point() or dtype in QUANTIZED)


def _layer(root: ir.Value, inputs: list[_WeightInput], place: str | None) -> Layer:
    """The layer of a stored constant, by all the inputs that lead back to it."""
    kinds = {item.kind for item in inputs}
    if tied := kinds == {"gather", "matrix"}:  # it is a table first of all
        inputs = sorted(inputs, key=lambda item: item.kind != "gather")
    first = inputs[0]
    tensor = constant(root)
    assert tensor is not None
    stored = tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    perm = first.trace.perm
    uses = []
    reason = next((item.trace.reason for item in inputs if item.trace.reason), None)
    if first.kind in ("recurrent", "other"):
        reason = reason or _no_method(first.use.node)
    for item in inputs:
        swapped = item.trace.perm != perm
        if swapped and item.trace.perm != _swap_last(perm):
            reason = reason or "no single factorization serves the layouts in which nodes use it"
        uses.append(replace(item.use, swapped=swapped))
    shape = tuple(stored[i] for i in perm) if perm else stored
    layer = Layer(
        first.use.node.name or "",
        first.use.node.op_type,
        "tied" if tied else first.kind,
        root,
        shape,
        tensor.dtype,
        tuple(uses),
        None,
        None,
        None if perm in ((), tuple(range(len(perm)))) else perm,
    )
    weight_refusal = _weight_refusal(layer, tensor, inputs, place)
    refusal = weight_refusal or reason or _refusal(layer, inputs)
    return replace(layer, weight_refusal=weight_refusal, refusal=refusal)


def _no_method(node: ir.Node) -> str:
    """That an operator's weights have no method."""
    if node.domain == "com.microsoft.nchwc":
        return (
            "ONNX Runtime has reordered the weight for one kind of processor: optimize the model "
            "before that, or save it with fewer graph optimizations"
        )
    if is_standard(node, *RECURRENT):
        return (
            f"no method replaces what meets the state of {node.op_type}: --expand-at-load stores "
            "it as factors"
        )
    domain = "" if is_standard(node, node.op_type) else f"{node.domain}."
    return f"no method replaces the weights of {domain}{node.op_type}"


def _swap_last(perm: Shape) -> Shape:
    """An order of axes with its last two exchanged."""
    return (*perm[:-2], perm[-1], perm[-2]) if len(perm) > 1 else perm


def _weight_refusal(
    layer: Layer, tensor: ir.TensorProtocol, inputs: list[_WeightInput], place: str | None
) -> str | None:
    """Why the stored weight must stay as it is, whatever the method; None if it may go."""
    if layer.kind == "quantized":
        return f"{layer.op} is already quantized: left alone"
    if any(item.trace.quantized for item in inputs):
        return next(item.trace.reason for item in inputs if item.trace.quantized)
    if layer.dtype in QUANTIZED:
        return f"the weight is quantized (stored as {layer.dtype.name.lower()}): left alone"
    if layer.dtype not in FLOATS:
        computed = next((item.trace.reason for item in inputs if item.trace.reason), None)
        return computed or f"the weight is stored as {layer.dtype.name.lower()}: left alone"
    if 0 in layer.shape:
        return f"the weight is empty (shape {layer.shape})"
    if layer.dtype == ir.DataType.DOUBLE:
        values = np.abs(np.asarray(tensor.numpy()))
        largest = float(values.max(initial=0.0, where=np.isfinite(values)))
        if largest > _LARGEST:
            return f"the weight's values reach {largest:.0e}, and their squares overflow"
    if place is not None:
        return f"{place}, which can't be inlined"
    if layer.weight.is_graph_output():
        return "the weight is also an output of the graph"
    return None


def _refusal(layer: Layer, inputs: list[_WeightInput]) -> str | None:
    """Why no chain can replace the layer, whatever the method; None if nothing forbids it."""
    if any(item.use.dtype not in FLOATS for item in inputs):
        return "the nodes that use it cast it to something other than floating point"
    kinds = {item.kind for item in inputs}
    if len(kinds) > 1 and layer.kind != "tied":
        ops = ", ".join(dict.fromkeys(item.use.node.op_type for item in inputs))
        return f"shared by {ops}, which no single factorization serves"
    if layer.convolves:
        if len({int_attr(item.use.node, "group", 1) for item in inputs}) > 1:
            return "the nodes that use it have different groups"
        if any(use.swapped for use in layer.uses):
            return "no single factorization serves the layouts in which nodes use it"
        if len(layer.shape) < 3 or layer.group < 1 or layer.shape[0] % layer.group:
            return f"shape {layer.shape} in {layer.group} groups is no convolution kernel"
        if misfits := [m for use in layer.uses for m in _odd_attributes(use.node, layer.shape[2:])]:
            return misfits[0]
    return foreign_user(layer.weight, {(item.use.node, item.use.slot) for item in inputs})


def _odd_attributes(node: ir.Node, kernel: Shape) -> Iterator[str]:
    """A reason for each attribute of a convolution that a kernel of these sizes contradicts."""
    for name, each, least in (
        *(("strides", 1, 1), ("dilations", 1, 1), ("pads", 2, 0), ("kernel_shape", 1, 1)),
        *(("output_padding", 1, 0), ("output_shape", 1, 1)),
    ):
        values = ints_attr(node, name, ())
        misfit = len(values) != each * len(kernel) or not all(least <= v < 2**31 for v in values)
        if values and (misfit or (name == "kernel_shape" and values != kernel)):
            yield f"{name} {list(values)} don't fit a kernel of {list(kernel)}"
