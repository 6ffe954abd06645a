"""Narrowed models: weights, biases and carriers cut to the channels that stay; no node is added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.find import find_layers
from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer
from onnxlr.model.attributes import float_attr
from onnxlr.model.constants import constant, values_of
from onnxlr.model.graph import (
    DEFAULT_VALUES_IR,
    Names,
    add_initializer,
    opset,
    remove_unused,
)
from onnxlr.types import Array, Shapes
from onnxlr.widths.find import Widths, find_widths
from onnxlr.widths.places import Mask, bias_place
from onnxlr.widths.strands import ConstantCut, Place, SizeCut, WeightCut, numbers

Kept = Mapping[str, tuple[int, ...]]  # the channels that stay, by the names of widths


@dataclass(frozen=True, eq=False)
class Solved:
    """What a reader becomes: a weight for the channels that stay, and the shift of its bias.

    Attributes
    ----------
    weight : ndarray of shape (m, k)
        As outputs × inputs; of a convolution's inputs each has all positions of the kernel.
    shift : ndarray of shape (m,) or None
        What its bias makes up for.
    """

    weight: Array
    shift: Array | None = None


def narrowed(model: ir.Model, shapes: Shapes, kept: Kept, solved: Mapping[str, Solved]) -> ir.Model:
    """A copy of a prepared model with widths narrowed; weights that aren't cut are shared.

    Parameters
    ----------
    model : onnx_ir.Model
    shapes : mapping of str to tuple of int
    kept : mapping of str to tuple of int
        Channels that stay, rising, by the names of widths; the others stay as they are.
    solved : mapping of str to Solved
        By the names of layers that read them.
    """
    result = model.clone()
    layers = find_layers(result, shapes)
    widths = find_widths(result, layers, shapes)
    edits = _Edits(result, Names(result), widths, widths.mask(kept))
    edits.cut_weights(solved)
    edits.cut_constants()
    edits.set_sizes()
    edits.correct_shapes()
    if kept and result.ir_version < DEFAULT_VALUES_IR:
        result.ir_version = DEFAULT_VALUES_IR
    return result


@dataclass
class _Edits:
    """Everything that is done to one model."""

    model: ir.Model
    names: Names
    widths: Widths
    stays: Mask  # of all channels
    _shifts: dict[tuple[ir.Node, int], Array] = field(default_factory=dict)

    def cut_weights(self, solved: Mapping[str, Solved]) -> None:
        """Rows and columns of weights; readers take what was solved for them."""
        layers: dict[str, tuple[Layer, dict[str, Mask]]] = {}
        for cut in self.widths.cuts:
            if isinstance(cut, WeightCut):
                masks = layers.setdefault(cut.layer.name, (cut.layer, {}))[1]
                masks[cut.side] = self.stays[cut.channels]
        for name, (layer, masks) in layers.items():
            if all(mask.all() for mask in masks.values()) and name not in solved:
                continue
            array = _cut_weight(layer, masks, solved.get(name))
            self._store(layer.weight, layer.to_stored(array), layer.dtype)
            if (item := solved.get(name)) is not None and item.shift is not None:
                rows = masks.get("out")
                self._add_shift(layer, item.shift if rows is None else item.shift[rows])

    def _add_shift(self, layer: Layer, shift: Array) -> None:
        """Remember what the biases of a layer's users make up for."""
        for use in layer.uses:
            place = bias_place(use)
            if place is None:
                continue
            factor = 1.0
            if use.node.op_type == "Gemm":
                alpha, beta = (float_attr(use.node, name, 1.0) for name in ("alpha", "beta"))
                factor = alpha / beta
            self._shifts[place] = factor * shift

    def cut_constants(self) -> None:
        """Constants with an entry for each channel, and biases with their shifts."""
        arrays: dict[tuple[ir.Node, int], NDArray[np.generic]] = {}
        for cut in self.widths.cuts:
            if not isinstance(cut, ConstantCut):
                continue
            key, mask = (cut.node, cut.slot), self.stays[cut.channels]
            if not mask.all():
                old = arrays[key] if key in arrays else _values(cut.node, cut.slot)
                arrays[key] = np.compress(mask, old, axis=cut.axis)
        for (node, slot), shift in self._shifts.items():
            key = node, slot
            if slot >= len(node.inputs) or node.inputs[slot] is None:
                arrays[key] = shift
            else:
                old = arrays[key] if key in arrays else _values(node, slot)
                arrays[key] = old.astype(np.float64) + shift
        groups: dict[ir.Value, dict[tuple[ir.Node, int], NDArray[np.generic]]] = {}
        for (node, slot), array in arrays.items():
            value = node.inputs[slot] if slot < len(node.inputs) else None
            if value is None:
                self._add_bias(node, slot, array)
            else:
                groups.setdefault(value, {})[node, slot] = array
        for value, places in groups.items():
            self._replace(value, places)

    def _add_bias(self, node: ir.Node, slot: int, array: NDArray[np.generic]) -> None:
        weight = node.inputs[1]
        dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
        assert weight is not None
        dtype = dtype or weight.dtype
        name = self.names.unused(f"{weight.name}/bias")
        node.resize_inputs(slot + 1)
        node.replace_input_with(slot, add_initializer(self.model.graph, name, array, dtype))

    def _replace(
        self, value: ir.Value, places: Mapping[tuple[ir.Node, int], NDArray[np.generic]]
    ) -> None:
        """A constant in its place; a new one for each user where others need it as it is."""
        tensor = constant(value)
        assert tensor is not None
        first = next(iter(places.values()))
        all_users = {(node, slot) for node, slot in value.uses()} == set(places)
        alike = all(np.array_equal(array, first) for array in places.values())
        if all_users and alike and not value.is_graph_output():
            self._store(value, first, tensor.dtype)
            return
        for (node, slot), array in places.items():
            name = self.names.unused(f"{value.name}/narrow")
            node.replace_input_with(
                slot, add_initializer(self.model.graph, name, array, tensor.dtype)
            )
        remove_unused([value])

    def _store(self, value: ir.Value, array: NDArray[np.generic], dtype: ir.DataType) -> None:
        """Give a constant other values, in its place."""
        stored = np.ascontiguousarray(array, dtype=dtype.numpy())
        if not value.is_initializer():  # the output of a Constant node
            name = self.names.unused(f"{value.name}/narrow")
            value.replace_all_uses_with(add_initializer(self.model.graph, name, stored, dtype))
            remove_unused([value])
            return
        value.const_value = ir.Tensor(stored, dtype=dtype, name=value.name)
        value.shape = ir.Shape(stored.shape)

    def set_sizes(self) -> None:
        """Attributes and lists that count channels."""
        for cut in self.widths.cuts:
            if not isinstance(cut, SizeCut):
                continue
            masks = [self.stays[c] for c in cut.channels]
            if all(mask.all() for mask in masks):
                continue
            # Of heads each keeps as many; nothing is before a slice that begins with the first.
            counts = [int((mask if mask.ndim == 1 else mask[0]).sum()) for mask in masks]
            if cut.what == "group":
                cut.node.attributes["group"] = ir.AttrInt64("group", counts[0])
            elif cut.what == "split":
                self._set_split(cut.node, counts)
            elif cut.what == "slice":
                before, inside = counts
                self._set_entry(cut.node, 1, cut.place, before)
                self._set_entry(cut.node, 2, cut.place, before + inside)
            else:
                self._set_entry(cut.node, 1, cut.place, counts[0])

    def _set_split(self, node: ir.Node, counts: Sequence[int]) -> None:
        if opset(self.model) < 13:
            node.attributes["split"] = ir.AttrInt64s("split", counts)
            return
        node.attributes.pop("num_outputs", None)
        stale = [v for v in node.inputs[1:] if v is not None]
        node.resize_inputs(2)
        name = self.names.unused(f"{node.name or node.outputs[0].name}/split")
        array = np.array(counts, dtype=np.int64)
        node.replace_input_with(1, add_initializer(self.model.graph, name, array))
        remove_unused(stale)

    def _set_entry(self, node: ir.Node, slot: int, place: Place | None, number: int) -> None:
        """Another number in a list of them, for this node alone."""
        assert place is not None
        if place.slot is not None:
            node, slot = self._concat_of(node, slot), place.slot
        value = node.inputs[slot]
        entries, tensor = numbers(value), constant(value)
        assert value is not None
        assert entries is not None
        assert tensor is not None
        entries[place.index] = number
        array = np.array(entries).reshape(values_of(tensor).shape)
        self._replace(value, {(node, slot): array})

    def _concat_of(self, node: ir.Node, slot: int) -> ir.Node:
        """The Concat that puts a list together for a node: a copy where others read that list."""
        value = node.inputs[slot]
        concat = None if value is None else value.producer()
        assert value is not None
        assert concat is not None
        if len(value.uses()) == 1 and not value.is_graph_output():
            return concat
        name = self.names.unused(f"{value.name}/narrow")
        copy = ir.node("Concat", list(concat.inputs), {"axis": 0}, name=name)
        copy.outputs[0].name, copy.outputs[0].type = name, value.type
        copy.outputs[0].shape = value.shape
        self.model.graph.insert_before(node, copy)
        node.replace_input_with(slot, copy.outputs[0])
        return copy

    def correct_shapes(self) -> None:
        """Shapes that the model says of its values."""
        for value, strand in self.widths.strands.items():
            if value.shape is None or len(value.shape) <= strand.axis:
                continue
            stays = self.stays[strand.channels]
            if not stays.all():
                sizes = list(value.shape)
                sizes[strand.axis] = int(stays.reshape(-1, stays.shape[-1])[0].sum())
                value.shape = ir.Shape(sizes)


def _values(node: ir.Node, slot: int) -> NDArray[np.generic]:
    tensor = constant(node.inputs[slot])
    assert tensor is not None
    return values_of(tensor)


def _cut_weight(
    layer: Layer, masks: Mapping[str, Mask], solved: Solved | None
) -> NDArray[np.generic]:
    """A layer's array, as its first user sees it, without what goes."""
    array = layer.array()
    if "through" in masks:
        return np.compress(masks["through"], array, axis=0)
    rows, columns = masks.get("out"), masks.get("in")
    if layer.convolves:
        kernel = kernel_of(layer)
        loaded = kernel.load(array)[0]  # (outputs, inputs, positions)
        if solved is not None:
            loaded = solved.weight.reshape(kernel.outputs, -1, kernel.positions)
        elif columns is not None:
            loaded = loaded[:, columns]
        loaded = loaded if rows is None else loaded[rows]
        outputs, inputs = loaded.shape[:2]
        small = Kernel(1, outputs, inputs, kernel.spatial, kernel.transposed)
        return small.store(loaded.astype(np.float64))
    lead, stacked = array.shape[:-2], array.reshape(-1, array.shape[-1])  # of all directions
    matrix = stacked if layer.uses[0].contracts_last else stacked.T
    if solved is not None:
        matrix = solved.weight
    elif columns is not None:
        matrix = matrix[:, columns]
    matrix = matrix if rows is None else matrix[rows]
    matrix = matrix if layer.uses[0].contracts_last else matrix.T
    return matrix.reshape(*lead, -1, matrix.shape[-1])
