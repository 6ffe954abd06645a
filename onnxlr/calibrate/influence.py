"""What the layers behind make of the errors of a layer's outputs: which directions count.

An error e of a layer's output is passed on by the layers behind it. To first order, and with
activations taken for the identity, they make eᵀ·G·e of it, G = Σ Wᵀ·G′·W over the layers W that
read the output, each with the G′ of its own output: the output-side factor of a Kronecker-factored
Gauss-Newton matrix by the recursion of Botev et al. 2017 (arXiv 1706.03662), without the
activations' slopes. Nothing is run for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.kernel import as_matrix
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.shapes import shape_of
from onnxlr.model.attributes import int_attr, ints_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard
from onnxlr.prepare.prepared import Prepared
from onnxlr.types import Array

_DAMPING = 1.0  # of the mean influence: what the recursion can't know counts too
_WIDEST = 2048  # channels, beyond which a product of this kind takes seconds

# A channel goes in and comes out at its place, whatever is done to it there.
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
class _Spot:
    """Where some channels are in a value: along an axis, each at some places of it.

    ``axis`` counts from the end; ``places`` has shape (channels, places each).
    """

    value: ir.Value
    axis: int
    places: NDArray[np.int64]


@dataclass
class _Backward:
    """The recursion, from the last layer to the first."""

    prepared: Prepared
    users: Mapping[ir.Node, tuple[Layer, Use]]
    found: dict[str, Array] = field(default_factory=dict)  # G of a layer's outputs, mean 1
    _grams: dict[str, Array] = field(default_factory=dict)

    def visit(self, layer: Layer) -> None:
        """Find G, (m, m) over all groups' outputs, where every user has the same axis of them."""
        if layer.kind not in ("matrix", "conv", "conv-transpose") or len(layer.shape) < 2:
            return
        channels = _outputs(layer)
        if channels > _WIDEST or not all(_faces(layer, use) for use in layer.uses):
            return
        with np.errstate(over="ignore", invalid="ignore"):  # what isn't finite is left out below
            self._visit(layer, channels)

    def _visit(self, layer: Layer, channels: int) -> None:
        total, known, unknown = np.zeros((channels, channels)), 0, 0
        for use in layer.uses:
            start = _Spot(use.node.outputs[0], _output_axis(layer, use), _places(channels))
            seen: set[tuple[str, int, bytes]] = set()
            stack = [start]
            while stack:
                spot = stack.pop()
                key = (spot.value.name or "", spot.axis, spot.places.tobytes())
                if key in seen:
                    continue
                seen.add(key)
                unknown += spot.value.is_graph_output()
                for node, slot in spot.value.uses():
                    if node in self.users:
                        part = self._of_user(node, spot)
                        if part is None:
                            unknown += 1
                        else:
                            total, known = total + part, known + 1
                        continue
                    after = self._through(node, slot, spot)
                    if after is None:
                        unknown += not is_standard(node, "Shape")
                    else:
                        stack.append(after)
        mean = float(np.trace(total)) / channels
        if known and mean > 0 and math.isfinite(mean):
            # A user that isn't understood takes every direction alike.
            share = unknown / known + _DAMPING
            self.found[layer.name] = (total / mean + share * np.eye(channels)) / (1 + share)

    def _of_user(self, node: ir.Node, spot: _Spot) -> Array | None:
        """Wᵀ·G′·W of a layer that reads the channels; None if it reads them otherwise."""
        layer, use = self.users[node]
        if use.x is not spot.value or layer.kind not in ("matrix", "conv", "conv-transpose"):
            return None
        if layer.kind == "matrix" and (len(layer.shape) != 2 or not _faces(layer, use)):
            return None
        if _input_axis(layer, use) != spot.axis or _outputs(layer) > _WIDEST:
            return None
        if spot.places.shape[1] == 1 and _inputs(layer) <= _WIDEST:
            if layer.name not in self._grams:
                self._grams[layer.name] = self._gram(layer, _places(_inputs(layer)))
            chosen = spot.places[:, 0]
            return self._grams[layer.name][np.ix_(chosen, chosen)]
        return self._gram(layer, spot.places) if len(spot.places) <= _WIDEST else None

    def _gram(self, layer: Layer, places: NDArray[np.int64]) -> Array:
        """Σ Wᵀ·G′·W over places and kernel positions, for channels at these places of the input."""
        weight = as_matrix(layer, layer.array())
        group, outputs, _ = weight.shape
        inputs = _inputs(layer) // group
        weight = weight.reshape(group, outputs, inputs, -1)
        own = self.found.get(layer.name)
        total = np.zeros((len(places), len(places)))
        for g in range(group):
            block = slice(g * outputs, (g + 1) * outputs)
            for at in places.T:
                mine = np.flatnonzero((at >= g * inputs) & (at < (g + 1) * inputs))
                if not mine.size:
                    continue
                columns = weight[g][:, at[mine] - g * inputs]  # (outputs, channels, positions)
                seen = columns if own is None else np.tensordot(own[block, block], columns, 1)
                total[np.ix_(mine, mine)] += np.tensordot(columns, seen, ([0, 2], [0, 2]))
        return (total + total.T) / 2

    def _through(self, node: ir.Node, slot: int, spot: _Spot) -> _Spot | None:
        """Where the channels are behind a node; None if that can't be told."""
        before, out = self._shape(spot.value), node.outputs[0] if node.outputs else None
        after = self._shape(out)
        if out is None or before is None or after is None or not is_standard(node, node.op_type):
            return None
        if is_standard(node, *_CHANNELWISE) and len(after) >= -spot.axis:
            kept = after[spot.axis] == before[spot.axis]
            return _Spot(out, spot.axis, spot.places) if kept else None
        if slot != 0 and node.op_type != "Concat":
            return None
        if is_standard(node, *_SPATIAL):
            kept = len(after) == len(before) and after[spot.axis] == before[spot.axis]
            return _Spot(out, spot.axis, spot.places) if kept else None
        axis = len(before) + spot.axis
        if is_standard(node, "Transpose"):
            perm = ints_attr(node, "perm", tuple(reversed(range(len(before)))))
            return _Spot(out, perm.index(axis) - len(before), spot.places)
        if is_standard(node, "Concat"):
            return self._joined(node, slot, spot, axis, before)
        if is_standard(node, "ReduceMean"):
            given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
            axes = ints_attr(node, "axes", ()) if given is None else given.numpy().tolist()
            if not axes or axis in [a % len(before) for a in axes]:
                return None
        if is_standard(node, "Flatten", "Reshape", "Squeeze", "Unsqueeze", "ReduceMean"):
            return _reshaped(out, spot, axis, before, after)
        return None

    def _joined(
        self, node: ir.Node, slot: int, spot: _Spot, axis: int, before: Sequence[int]
    ) -> _Spot | None:
        """Behind a Concat: further along, if it joins the axis of the channels."""
        out, first = node.outputs[0], 0
        if int_attr(node, "axis", 0) % len(before) == axis:
            shapes = [self._shape(value) for value in node.inputs[:slot]]
            if any(shape is None for shape in shapes):
                return None
            first = sum(shape[axis] for shape in shapes if shape is not None)
        return _Spot(out, spot.axis, spot.places + first)

    def _shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        return shape_of(value, self.prepared.model.graph, self.prepared.shapes)


def _reshaped(
    out: ir.Value, spot: _Spot, axis: int, before: Sequence[int], after: Sequence[int]
) -> _Spot | None:
    """Where channels are once an array has another shape and the same elements, or means of them.

    Told where what stands before their axis keeps its size: then the axis stays, alone or with all
    that stands behind it.
    """
    front, size, behind = math.prod(before[:axis]), before[axis], math.prod(before[axis + 1 :])
    for i, n in enumerate(after):
        if math.prod(after[:i]) != front:
            continue
        if n == size and size > 1:
            return _Spot(out, i - len(after), spot.places)
        if n == size * behind and math.prod(after[i:]) == size * behind:
            spread = spot.places[:, :, None] * behind + np.arange(behind)
            return _Spot(out, i - len(after), spread.reshape(len(spot.places), -1))
    return None


def _places(channels: int) -> NDArray[np.int64]:
    return np.arange(channels, dtype=np.int64)[:, None]


def _outputs(layer: Layer) -> int:
    if layer.convolves:
        return layer.shape[0] if layer.kind == "conv" else layer.group * layer.shape[1]
    return layer.shape[-2] if layer.uses[0].contracts_last else layer.shape[-1]


def _inputs(layer: Layer) -> int:
    if layer.convolves:
        return layer.group * layer.shape[1] if layer.kind == "conv" else layer.shape[0]
    return layer.shape[-1] if layer.uses[0].contracts_last else layer.shape[-2]


def _faces(layer: Layer, use: Use) -> bool:
    """Whether a use takes the weight's inputs for inputs: tied weights are seen both ways round."""
    return layer.convolves or use.contracts_last == layer.uses[0].contracts_last


def _output_axis(layer: Layer, use: Use) -> int:
    if layer.convolves:
        return 1 - len(layer.shape)
    return -2 if use.slot == 0 and not _meets_vector(use) else -1


def _meets_vector(use: Use) -> bool:
    return use.x_shape is not None and len(use.x_shape) < 2


def _input_axis(layer: Layer, use: Use) -> int:
    if layer.convolves:
        return 1 - len(layer.shape)
    left = use.slot == 0 and not _meets_vector(use)
    turned = use.node.op_type == "Gemm" and int_attr(use.node, "transB" if left else "transA", 0)
    return -2 if left != bool(turned) else -1


def influences(prepared: Prepared) -> dict[str, Array]:
    """For each layer the square root of G for every group, where something is known of it.

    Returns
    -------
    dict of str to ndarray of shape (g, m, m)
        By layer name; G is scaled to a mean diagonal of 1 over all groups.
    """
    # What is stored for a refused layer need not be the weight that its users see.
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
        whole = backward.found.get(layer.name)
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
