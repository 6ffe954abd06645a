"""Finding the layers of a model: every constant weight of a heavy operator, with all its users."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.axes import counted_axes
from onnxlr.errors import ModelError
from onnxlr.model import constant, int_attr, ints_attr, is_standard, values_of
from onnxlr.operators import FLOATS, MICROSOFT, QUANTIZED, STANDARD, Kind
from onnxlr.tracing import Trace, foreign_user, trace

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
_LARGEST = 1e100  # of a weight's values: squares, and sums of them, stay in range
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Use:
    """One node that reads a layer's weight.

    Attributes
    ----------
    node : onnx_ir.Node
    slot : int
        Which of the node's inputs the weight is.
    swapped : bool
        Whether the node sees the last two axes of the layer's array exchanged.
    dtype : onnx_ir.DataType
        Type the node computes in, after any Cast.
    x_shape, y_shape : tuple of int or None
        Static shapes of the other operand and of the output, where known.
    x_axes, y_axes : int or None
        How many axes they have, where it is as many for all that may be fed.
    """

    node: ir.Node
    slot: int
    swapped: bool
    dtype: ir.DataType
    x_shape: Shape | None
    y_shape: Shape | None
    x_axes: int | None
    y_axes: int | None

    @property
    def x(self) -> ir.Value:
        """The operand that isn't the weight."""
        other = self.node.op_type in ("MatMul", "Gemm", "Gather") and self.slot == 0
        index = 1 if other else 0
        value = self.node.inputs[index]
        assert value is not None
        return value

    @property
    def weight_transposed(self) -> bool:
        """Gemm's transA or transB, whichever belongs to the weight."""
        if self.node.op_type != "Gemm":
            return False
        return bool(int_attr(self.node, "transA" if self.slot == 0 else "transB", 0))

    @property
    def contracts_last(self) -> bool:
        """Whether the sum runs over the last axis of the layer's array (else the last but one)."""
        return (self.slot == 0) != (self.swapped != self.weight_transposed)


@dataclass(frozen=True, eq=False)
class Layer:
    """A constant weight and every node that uses it.

    Attributes
    ----------
    name : str
        The first user's name; the weight's where that user has none.
    op : str
        Operator of the first user.
    kind : str
        What passes choose by.
    weight : onnx_ir.Value
        The stored constant. A weight shared by several nodes is one layer.
    shape : tuple of int
        As the first user sees it.
    dtype : onnx_ir.DataType
        As stored.
    uses : tuple of Use
    refusal : str or None
        Why no chain can replace it, whatever the method.
    locked : str or None
        Why its stored weight can't be replaced either; implies a refusal.
    """

    name: str
    op: str
    kind: Kind
    weight: ir.Value
    shape: Shape
    dtype: ir.DataType
    uses: tuple[Use, ...]
    refusal: str | None = None
    locked: str | None = None
    _perm: Shape | None = field(default=None, repr=False)

    @property
    def params(self) -> int:
        """Number of weight elements, counted once however many nodes share them."""
        return math.prod(self.shape)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all users in one run; None if a shape is unknown."""
        counts = [_use_macs(use, self.shape) for use in self.uses]
        return None if None in counts else sum(c for c in counts if c is not None)

    @property
    def group(self) -> int:
        """Groups of a convolution; 1 for everything else."""
        return int_attr(self.uses[0].node, "group", 1) if self.convolves else 1

    @property
    def convolves(self) -> bool:
        """Whether its users are convolutions, transposed or not."""
        return self.kind in ("conv", "conv-transpose")

    @property
    def stored_shape(self) -> Shape:
        """Shape of the weight as it is stored."""
        if self._perm is None:
            return self.shape
        return tuple(self.shape[self._perm.index(i)] for i in range(len(self._perm)))

    def lookup_axis(self, use: Use) -> int:
        """The axis of ``shape`` along which a Gather looks up."""
        count = len(self.shape)
        axis = int_attr(use.node, "axis", 0) % count
        return 2 * count - 3 - axis if use.swapped and axis >= count - 2 else axis

    def array(self) -> NDArray[np.generic]:
        """The weight as the first user sees it, in its stored type.

        Raises
        ------
        ModelError
            If it holds NaN or infinity.
        """
        return self.seen(self.stored_array())

    def seen(self, stored: NDArray[T]) -> NDArray[T]:
        """From the stored layout to the one that the first user sees."""
        return stored if self._perm is None else stored.transpose(self._perm)

    def stored_array(self) -> NDArray[np.generic]:
        """The weight as it is stored.

        Raises
        ------
        ModelError
            If it holds NaN or infinity.
        """
        tensor = constant(self.weight)
        assert tensor is not None
        array = values_of(tensor)
        with np.errstate(invalid="ignore"):  # a NaN that signals is to be counted, no more
            bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ModelError(
                f"the weight {self.weight.name!r} of {self.op} {self.name!r} holds {bad} NaN or "
                f"infinite values out of {array.size}: repair or re-export the model"
            )
        return array


def _use_macs(use: Use, shape: Shape) -> int | None:
    """Multiply-accumulates of one user of a weight of this shape; None if a shape is unknown."""
    if use.y_shape is None:
        return None
    outputs = math.prod(use.y_shape)
    match use.node.op_type:
        case "MatMul" | "Gemm":
            return outputs * (shape[-1] if use.contracts_last or len(shape) < 2 else shape[-2])
        case "Conv":
            return outputs * math.prod(shape[1:])
        case "ConvTranspose":
            inputs = use.x_shape
            return None if inputs is None else math.prod(inputs) * math.prod(shape[1:])
        case "Gather":
            return 0
    return None


HEAVY = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def heavy_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the main graph whose multiply-accumulates count."""
    for node in model.graph:
        if is_standard(node, *HEAVY):
            yield node


def operator_macs(op_type: str, x: Shape, w: Shape, y: Shape, *, trans_a: bool) -> int:
    """Multiply-accumulates of a ``HEAVY`` operator from the shapes of its inputs and its output."""
    if op_type == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if op_type == "Conv":
        return math.prod(y) * math.prod(w[1:])
    return math.prod(y) * (x[0] if trans_a else x[-1])


def count_macs(model: ir.Model, shapes: Shapes) -> int:
    """Multiply-accumulates of every MatMul, Gemm, Conv and ConvTranspose in the main graph.

    Products of two activations count too. Nodes whose shapes are unknown don't, nor what is
    computed of constants alone, when a session loads.
    """
    total = 0
    for node in heavy_nodes(model):
        x, w, y = (
            shape_of(v, model.graph, shapes)
            for v in (node.inputs[0], node.inputs[1], node.outputs[0])
        )
        once = all(_is_fixed(trace(v)) for v in node.inputs[:2])
        if once or x is None or w is None or y is None:
            continue
        flipped = bool(int_attr(node, "transA", 0))
        total += operator_macs(node.op_type, x, w, y, trans_a=flipped)
    return total


def _is_fixed(seen: Trace | None) -> bool:
    """Whether a value is of a constant alone, in whose place no caller feeds another."""
    return seen is not None and not seen.root.is_graph_input()


def shape_of(value: ir.Value | None, graph: ir.Graph, shapes: Shapes) -> Shape | None:
    """The static shape of a value, where it is known.

    The names that have shapes are the main graph's: a body may have its own values of these names,
    if they aren't in its sight.
    """
    tensor = constant(value)
    if tensor is not None:
        return tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    if value is None or value.graph is not graph:
        return None
    return shapes.get(value.name or "")


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
    axes = counted_axes(model.graph)
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
        weights = [(s, t) for s, t in weights if _is_fixed(t)]
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
    locked = _lock(layer, tensor, sightings, place)
    return replace(layer, locked=locked, refusal=locked or reason or _refusal(layer, sightings))


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
