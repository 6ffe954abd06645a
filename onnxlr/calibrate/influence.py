"""Which directions of a layer's outputs count: the influence of their errors on later layers.

An error e of a layer's output is passed on by later layers. To first order, and with
activations taken for the identity, they make eᵀ·G·e of it, G = Σ Wᵀ·G′·W over the layers W that
read the output, each with the G′ of its output: the output-side factor of a Kronecker-factored
Gauss-Newton matrix by the recursion of Botev et al. 2017 (arXiv 1706.03662), without the
activations' slopes. Nothing is run for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.kernel import as_matrix, output_count
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.shapes import shape_of
from onnxlr.model.attributes import int_attr, ints_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard
from onnxlr.prepare.prepared import Prepared
from onnxlr.types import Array

_DAMPING = 1.0  # times the mean influence, for what the recursion leaves out
_WIDEST = 2048  # channels, beyond which a product Wᵀ·G·W takes seconds

# Operators that leave every channel at its place.
_CHANNELWISE = (
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Clip", "Sigmoid"),
    *("HardSigmoid", "HardSwish", "Tanh", "Softplus", "Softsign", "Gelu", "Mish", "Erf", "Sqrt"),
    *("Add", "Sub", "Mul", "Div", "Identity", "Dropout", "Cast", "BatchNormalization"),
    *("InstanceNormalization", "LayerNormalization", "GroupNormalization", "LRN", "Neg", "Abs"),
)
_SPATIAL = (
    *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "Resize"),
    *("Upsample", "Pad"),
)


@dataclass(frozen=True, eq=False)
class _Location:
    """Where a layer's output channels are in a value: each at some places along an axis.

    ``axis`` counts from the end; ``places`` has shape (channels, places of each).
    """

    value: ir.Value
    axis: int
    places: NDArray[np.int64]


@dataclass
class _Backward:
    """The recursion, from the last layer to the first."""

    prepared: Prepared
    users: Mapping[ir.Node, tuple[Layer, Use]]
    influence: dict[str, Array] = field(default_factory=dict)  # G of a layer's outputs, mean 1
    _grams: dict[str, Array] = field(default_factory=dict)

    def visit(self, layer: Layer) -> None:
        """Compute G, (m, m) over all groups' outputs, where every user has them along one axis."""
        rows = layer.kind == "gather" and _gives_rows(layer)
        if layer.kind not in ("matrix", "conv", "conv-transpose") and not rows:
            return
        if len(layer.shape) < 2:
            return
        channels = output_count(layer)
        if channels > _WIDEST or not all(_has_first_orientation(layer, use) for use in layer.uses):
            return
        with np.errstate(over="ignore", invalid="ignore"):  # a mean that isn't finite ends it below
            self._visit(layer, channels)

    def _visit(self, layer: Layer, channels: int) -> None:
        """Follow the channels from every user's output to all layers that read them."""
        total = np.zeros((channels, channels))
        layers, others = 0, 0  # how many readers are layers whose influence is clear, and are not
        for use in layer.uses:
            start = _Location(use.node.outputs[0], _output_axis(layer, use), _places(channels))
            visited: set[tuple[str, int, bytes]] = set()
            stack = [start]
            while stack:
                location = stack.pop()
                key = (location.value.name or "", location.axis, location.places.tobytes())
                if key in visited:
                    continue
                visited.add(key)
                others += location.value.is_graph_output()
                for node, slot in location.value.uses():
                    if node in self.users:
                        part = self._of_user(node, location)
                        if part is None:
                            others += 1
                        else:
                            total, layers = total + part, layers + 1
                        continue
                    after = self._through(node, slot, location)
                    if after is None:
                        others += not is_standard(node, "Shape")
                    else:
                        stack.append(after)
        mean = float(np.trace(total)) / channels
        if layers and mean > 0 and math.isfinite(mean):
            # A reader whose influence is unclear counts every direction alike.
            share = others / layers + _DAMPING
            self.influence[layer.name] = (total / mean + share * np.eye(channels)) / (1 + share)

    def _of_user(self, node: ir.Node, location: _Location) -> Array | None:
        """Wᵀ·G′·W of a layer that reads the channels; None if it reads them otherwise."""
        layer, use = self.users[node]
        if use.x is not location.value or layer.kind not in ("matrix", "conv", "conv-transpose"):
            return None
        if layer.kind == "matrix" and len(layer.shape) != 2:
            return None
        if not _has_first_orientation(layer, use):
            return None
        if _input_axis(layer, use) != location.axis or output_count(layer) > _WIDEST:
            return None
        if location.places.shape[1] == 1 and _inputs(layer) <= _WIDEST:
            if layer.name not in self._grams:
                self._grams[layer.name] = self._gram(layer, _places(_inputs(layer)))
            place = location.places[:, 0]
            return self._grams[layer.name][np.ix_(place, place)]
        return self._gram(layer, location.places) if len(location.places) <= _WIDEST else None

    def _gram(self, layer: Layer, places: NDArray[np.int64]) -> Array:
        """Σ Wᵀ·G′·W over places and kernel positions, for channels at these places of the input."""
        weight = as_matrix(layer, layer.array())
        group, outputs, _ = weight.shape
        inputs = _inputs(layer) // group
        weight = weight.reshape(group, outputs, inputs, -1)
        influence = self.influence.get(layer.name)
        total = np.zeros((len(places), len(places)))
        for g in range(group):
            block = slice(g * outputs, (g + 1) * outputs)
            for column in places.T:
                inside = np.flatnonzero((column >= g * inputs) & (column < (g + 1) * inputs))
                if not inside.size:
                    continue
                columns = weight[g][:, column[inside] - g * inputs]  # (outputs, channels, kh·kw)
                if influence is None:
                    weighted = columns
                else:
                    weighted = np.tensordot(influence[block, block], columns, 1)
                gram = np.tensordot(columns, weighted, ([0, 2], [0, 2]))
                total[np.ix_(inside, inside)] += gram
        return (total + total.T) / 2

    def _through(self, node: ir.Node, slot: int, location: _Location) -> _Location | None:
        """Where the channels are in the output of a node; None if that is unclear."""
        before, out = self._shape(location.value), node.outputs[0] if node.outputs else None
        after = self._shape(out)
        if out is None or before is None or after is None or not is_standard(node, node.op_type):
            return None
        if is_standard(node, *_CHANNELWISE) and len(after) >= -location.axis:
            same = after[location.axis] == before[location.axis]
            return _Location(out, location.axis, location.places) if same else None
        if slot != 0 and node.op_type != "Concat":
            return None
        if is_standard(node, *_SPATIAL):
            same = len(after) == len(before) and after[location.axis] == before[location.axis]
            return _Location(out, location.axis, location.places) if same else None
        axis = len(before) + location.axis
        if is_standard(node, "Transpose"):
            perm = ints_attr(node, "perm", tuple(reversed(range(len(before)))))
            return _Location(out, perm.index(axis) - len(before), location.places)
        if is_standard(node, "Concat"):
            return self._joined(node, slot, location, axis, before)
        if is_standard(node, "ReduceMean"):
            tensor = constant(node.inputs[1]) if len(node.inputs) > 1 else None
            axes = ints_attr(node, "axes", ()) if tensor is None else tensor.numpy().tolist()
            if not axes or axis in [a % len(before) for a in axes]:
                return None
        if is_standard(node, "Flatten", "Reshape", "Squeeze", "Unsqueeze", "ReduceMean"):
            return _reshaped(out, location, axis, before, after)
        return None

    def _joined(
        self, node: ir.Node, slot: int, location: _Location, axis: int, before: Sequence[int]
    ) -> _Location | None:
        """Where the channels are behind a Concat: further along, if it joins their axis."""
        out, first = node.outputs[0], 0
        if int_attr(node, "axis", 0) % len(before) == axis:
            shapes = [self._shape(value) for value in node.inputs[:slot]]
            if any(shape is None for shape in shapes):
                return None
            first = sum(shape[axis] for shape in shapes if shape is not None)
        return _Location(out, location.axis, location.places + first)

    def _shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        return shape_of(value, self.prepared.model.graph, self.prepared.shapes)


def _reshaped(
    out: ir.Value, location: _Location, axis: int, before: Sequence[int], after: Sequence[int]
) -> _Location | None:
    """Where channels are once an array has another shape and the same elements, or means of them.

    That is clear where the axes before theirs keep their size together: then their axis stays,
    alone or merged with all axes behind it. None for any other shape.
    """
    front, size, behind = math.prod(before[:axis]), before[axis], math.prod(before[axis + 1 :])
    for i, n in enumerate(after):
        if math.prod(after[:i]) != front:
            continue
        if n == size and size > 1:
            return _Location(out, i - len(after), location.places)
        if n == size * behind and math.prod(after[i:]) == size * behind:
            spread = location.places[:, :, None] * behind + np.arange(behind)
            return _Location(out, i - len(after), spread.reshape(len(location.places), -1))
    return None


def _places(channels: int) -> NDArray[np.int64]:
    """The places of channels that are one after the other: an array of shape (channels, 1)."""
    return np.arange(channels, dtype=np.int64)[:, None]


def _inputs(layer: Layer) -> int:
    """The number of input channels of all groups."""
    if layer.convolves:
        return layer.group * layer.shape[1] if layer.kind == "conv" else layer.shape[0]
    return layer.shape[-1] if layer.uses[0].contracts_last else layer.shape[-2]


def _gives_rows(layer: Layer) -> bool:
    """Whether all users of a table look up whole rows: the last axis has the outputs then."""
    if len(layer.shape) != 2:
        return False
    return all(layer.lookup_axis(use) == 0 and not use.swapped for use in layer.uses)


def _has_first_orientation(layer: Layer, use: Use) -> bool:
    """Whether a use has the first use's inputs for inputs: tied weights serve both ways round."""
    if layer.convolves or layer.kind == "gather":
        return True
    return use.contracts_last == layer.uses[0].contracts_last


def _output_axis(layer: Layer, use: Use) -> int:
    """The axis of a use's output along which its channels are, counted from the end."""
    if layer.convolves:
        return 1 - len(layer.shape)
    if layer.kind == "gather":
        return -1
    return -2 if use.slot == 0 and not _meets_vector(use) else -1


def _meets_vector(use: Use) -> bool:
    """Whether the operand beside the weight is a vector."""
    return use.x_shape is not None and len(use.x_shape) < 2


def _input_axis(layer: Layer, use: Use) -> int:
    """The axis of a use's input along which its channels are, counted from the end."""
    if layer.convolves:
        return 1 - len(layer.shape)
    left = use.slot == 0 and not _meets_vector(use)
    turned = use.node.op_type == "Gemm" and int_attr(use.node, "transB" if left else "transA", 0)
    return -2 if left != bool(turned) else -1


def influences(prepared: Prepared) -> dict[str, Array]:
    """For each layer the square root of G for every group, where layers read its outputs.

    Returns
    -------
    dict of str to ndarray of shape (g, m, m)
        By layer name; G is scaled to a mean diagonal of 1 over all groups.
    """
    # The stored constant of a refused layer need not be the weight that its users multiply by.
    layers = [layer for layer in prepared.layers if layer.refusal is None]
    users = {use.node: (layer, use) for layer in layers for use in layer.uses}
    backward = _Backward(prepared, users)
    order = {node: i for i, node in enumerate(prepared.model.graph)}
    last = {
        layer.name: max((order.get(use.node, -1) for use in layer.uses), default=-1)
        for layer in layers
    }
    for layer in sorted(layers, key=lambda item: -last[item.name]):
        if last[layer.name] >= 0:
            backward.visit(layer)
    roots = {}
    for layer in layers:
        whole = backward.influence.get(layer.name)
        if whole is not None:
            m = len(whole) // layer.group
            blocks = [slice(g * m, (g + 1) * m) for g in range(layer.group)]
            roots[layer.name] = np.stack([_root(whole[block, block]) for block in blocks])
    return roots


def _root(matrix: Array) -> Array:
    """The symmetric square root of a positive definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: Array = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root
