"""Operators with weights: they read channels, write new ones, or pass whole groups on."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxlr.layers.kernel import kernel_of, matrix_sides
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.operators import PROJECTING
from onnxlr.layers.tracing import is_fixed, trace
from onnxlr.model.attributes import float_attr, int_attr
from onnxlr.model.constants import constant
from onnxlr.widths.strands import Channels, ConstantCut, SizeCut, Strand, Tracker, WeightCut, called

# What uses the weights of each kind of layer.
_HEAVY: Mapping[str, tuple[str, ...]] = {
    "matrix": ("MatMul", "Gemm"),
    "conv": ("Conv",),
    "conv-transpose": ("ConvTranspose",),
    "projection": PROJECTING,
}


class Weights:
    """The layers of a model by their nodes, with the channels that each has been seen with.

    Parameters
    ----------
    layers : sequence of Layer
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._uses: dict[ir.Node, tuple[Layer, Use]] = {}
        for layer in layers:
            for use in layer.uses:
                # What meets the input of an operator with several weights decides.
                if use.node not in self._uses or layer.kind == "projection":
                    self._uses[use.node] = layer, use
        self._seen: dict[str, tuple[Channels | None, Channels | None]] = {}

    def visit(self, tracker: Tracker, node: ir.Node) -> bool:
        """Follow channels through a node; False if it has no weight."""
        if node not in self._uses:
            return False
        layer, use = self._uses[node]
        strands = [tracker.strand(v) for v in node.inputs]
        why = self._refusal(layer, use, tracker.graph)
        if why is not None:
            tracker.refuse(strands, why)
            return True
        x = tracker.strand(use.x)
        others = [s for v, s in zip(node.inputs, strands, strict=True) if v is not use.x]
        tracker.refuse(others, f"read by {called(node)} beside its input")
        if layer.kind == "projection":
            self._project(tracker, layer, use, x)
        elif layer.convolves and layer.group > 1:
            self._pass_groups(tracker, layer, use, x)
        else:
            self._read_and_write(tracker, layer, use, x)
        return True

    def _refusal(self, layer: Layer, use: Use, graph: ir.Graph) -> str | None:
        """Why channels end at a layer."""
        node = use.node
        if layer.kind not in _HEAVY:
            return f"read by {called(node)}, whose weights stay as they are"
        if layer.refusal is not None:
            return f"read by {called(node)}: {layer.refusal}"
        nodes = [u.node for u in layer.uses]
        operators = _HEAVY[layer.kind]
        if any(n.graph is not graph or n.op_type not in operators for n in nodes):
            return f"read by {called(node)}, whose weight has other uses in a body or as a table"
        if layer.weight.is_graph_input():
            return f"a caller may feed the weight of {called(node)}"
        if layer.kind == "projection" and use.x_shape is None:
            return f"{called(node)} has an input of unclear shape"
        if layer.kind != "matrix":
            return None
        if len(layer.shape) != 2 or use.slot != 1:
            return f"read by {called(node)}, a stack of matrices or one that stands on the left"
        if len({u.contracts_last for u in layer.uses}) > 1:
            return f"{called(node)} and others multiply its weight from both sides"
        if use.x_shape is None or len(use.x_shape) < 2 or use.y_shape is None:
            return f"{called(node)} has an input of unclear shape"
        if int_attr(node, "transA", 0) or (node.op_type == "Gemm" and not _beta(node)):
            return f"{called(node)} reads it transposed, or leaves its bias out"
        return None

    def _read_and_write(self, tracker: Tracker, layer: Layer, use: Use, x: Strand | None) -> None:
        """A whole weight: its columns read the channels of x, its rows write new ones."""
        node, inputs, outputs = use.node, *_sizes(layer)
        axis = 1
        if layer.kind == "matrix":
            assert use.y_shape is not None
            axis = len(use.y_shape) - 1
        before = self._seen.get(layer.name)
        read = self._read(tracker, layer, use, x, axis, inputs)
        written = tracker.fresh(outputs)
        if before is None:
            tracker.cuts.append(WeightCut(layer, use, "out", written))
            self._seen[layer.name] = read, written
        else:
            self._share(tracker, layer, before, (read, written))
        strand = Strand(axis, written)
        tracker.put(node.outputs[0], strand)
        self._bias(tracker, use, strand)

    def _project(self, tracker: Tracker, layer: Layer, use: Use, x: Strand | None) -> None:
        """A weight that reads channels, and whose operator makes something else of the product."""
        assert use.x_shape is not None
        before = self._seen.get(layer.name)
        read = self._read(tracker, layer, use, x, len(use.x_shape) - 1, matrix_sides(layer)[2])
        if before is None:
            self._seen[layer.name] = read, None
        else:
            self._share(tracker, layer, before, (read, None))

    def _read(
        self, tracker: Tracker, layer: Layer, use: Use, x: Strand | None, axis: int, inputs: int
    ) -> Channels | None:
        """The channels that a weight reads, which the first of its uses cuts; None for none."""
        if x is None:
            return None
        if x.axis != axis or len(x.channels) != inputs:
            tracker.refuse([x], f"{called(use.node)} multiplies another axis of it")
            return None
        if layer.name not in self._seen:
            tracker.cuts.append(WeightCut(layer, use, "in", x.channels))
        return x.channels

    def _share(
        self,
        tracker: Tracker,
        layer: Layer,
        before: tuple[Channels | None, Channels | None],
        now: tuple[Channels | None, Channels | None],
    ) -> None:
        """A weight that several nodes use: they have to read and write the same channels."""
        for a, b in zip(before, now, strict=True):
            if a is not None and b is not None:
                tracker.bind(a, b)
            else:
                why = f"{layer.name!r} reads it here, and elsewhere what no weight writes"
                tracker.refusals += [(c, why) for c in (a, b) if c is not None]

    def _pass_groups(self, tracker: Tracker, layer: Layer, use: Use, x: Strand | None) -> None:
        """A grouped convolution passes on whole groups: their inputs and outputs are bound."""
        kernel, node = kernel_of(layer), use.node
        group, inputs, outputs = kernel.group, kernel.inputs, kernel.outputs
        if x is None or x.axis != 1 or len(x.channels) != group * inputs:
            tracker.refuse([x], f"{called(node)} convolves another axis of it")
            written = tracker.foreign(group * outputs, f"{called(node)} reads what stays")
            tracker.put(node.outputs[0], Strand(1, written))
            return
        read = x.channels.reshape(group, inputs)
        first = np.ascontiguousarray(read[:, 0])
        for column in read.T[1:]:
            tracker.bind(first, np.ascontiguousarray(column))
        written = np.repeat(first, outputs) if outputs > 1 else first
        if layer.name in self._seen:
            self._share(tracker, layer, self._seen[layer.name], (first, None))
        else:
            self._seen[layer.name] = first, None
            rows = x.channels if kernel.transposed else written
            tracker.cuts.append(WeightCut(layer, use, "through", rows))
        tracker.cuts.append(SizeCut(node, "group", (first,)))
        strand = Strand(1, written)
        tracker.put(node.outputs[0], strand)
        self._bias(tracker, use, strand)

    def _bias(self, tracker: Tracker, use: Use, strand: Strand) -> None:
        """The bias of a Conv or Gemm is cut with what is written."""
        node = use.node
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value is None or node.op_type == "MatMul":
            return
        tensor = constant(value)
        if tensor is None or not is_fixed(trace(value)):
            tracker.refuse([strand], f"the bias of {called(node)} is no constant")
            return
        sizes = [int(d) for d in tensor.shape]  # type: ignore[arg-type]
        if sizes and sizes[-1] == len(strand.channels):
            tracker.cuts.append(ConstantCut(node, 2, len(sizes) - 1, strand.channels))


def _sizes(layer: Layer) -> tuple[int, int]:
    """Inputs and outputs of a weight of one group."""
    if layer.convolves:
        kernel = kernel_of(layer)
        return kernel.inputs, kernel.outputs
    first, second = layer.shape
    return (second, first) if layer.uses[0].contracts_last else (first, second)


def _beta(node: ir.Node) -> float:
    return float_attr(node, "beta", 1.0)
