"""How many axes values have, where that is so for all that may be fed: nothing else is counted on.

``x.squeeze()`` drops the batch where that is one, ``x[mask]`` and branches hang on values: what one
feed shows of them need not hold for the next. So a number of axes is told here by what operators
promise alone; where they promise nothing, or aren't known here, none is told.
"""

from collections.abc import Sequence

import onnx_ir as ir

from onnxlr.model.attributes import int_attr, ints_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard

Count = int | None

# As many axes as the first input.
_KEPT = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "AveragePool"),
    *("BatchNormalization", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat", "Conv"),
    *("ConvInteger", "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear"),
    *("Dropout", "Elu", "Erf", "Exp", "EyeLike", "Floor", "GatherElements", "Gelu"),
    *("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GroupNormalization", "HardSigmoid"),
    *("HardSwish", "Hardmax", "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LRN"),
    *("LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization", "LpPool"),
    *("MaxPool", "Mish", "Neg", "Not", "PRelu", "Pad", "QLinearConv", "QuantizeLinear"),
    *("RMSNormalization", "RandomNormalLike", "RandomUniformLike", "Reciprocal", "Relu", "Resize"),
    *("ReverseSequence", "Round", "ScatterElements", "ScatterND", "Selu", "Shrink", "Sigmoid"),
    *("Sign", "Sin", "Sinh", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split"),
    *("Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu"),
    "Upsample",
)
# As many as the input that has most: the others are spread to it.
_SPREAD = (
    *("Add", "And", "BitShift", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor"),
)
_REDUCING = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
)
_SHAPED = ("Reshape", "Expand", "ConstantOfShape")  # by a list of sizes, one for each axis
_OWN = {"Flatten": 2, "Gemm": 2, "NonZero": 2, "Range": 1, "Shape": 1, "Size": 0}
_RECURRENT = {"GRU": (4, 3), "LSTM": (4, 3, 3), "RNN": (4, 3)}
_ALL_ALIKE = ("Split", "TopK")  # in all of their outputs; of others only the first is told


def axis_counts(graph: ir.Graph) -> dict[ir.Value, int]:
    """The number of axes of a graph's values; those that may have more or fewer are left out.

    Parameters
    ----------
    graph : onnx_ir.Graph
        The main graph, in order. Values of the bodies in it are told of too.
    """
    found = _Counted()
    for value in graph.inputs:
        if value.shape is not None:
            found.axes[value] = len(value.shape)
            if len(value.shape) == 1 and isinstance(value.shape[0], int):
                found.lengths[value] = value.shape[0]
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        for node in current:
            if is_standard(node, node.op_type):
                found.visit(node)
                waiting += found.bodies(node)
    return found.axes


class _Counted:
    """Numbers of axes, and how many entries lists have: sizes and axes are handed on as lists."""

    def __init__(self) -> None:
        self.axes: dict[ir.Value, int] = {}
        self.lengths: dict[ir.Value, int] = {}

    def visit(self, node: ir.Node) -> None:
        """Tell of a node's outputs."""
        counts: Sequence[Count] = _RECURRENT.get(node.op_type, ())
        if not counts:
            alike = len(node.outputs) if node.op_type in _ALL_ALIKE else 1
            counts = [self._count(node)] * alike
        for value, count in zip(node.outputs, counts, strict=False):
            if count is not None:
                self.axes[value] = count
        if counts[0] == 1 and (length := self._length(node)) is not None:
            self.lengths[node.outputs[0]] = length

    def bodies(self, node: ir.Node) -> list[ir.Graph]:
        """The bodies of a node, once it is told what they are given."""
        attributes = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        graphs = [a.as_graph() for a in attributes if not a.is_ref()]
        # That of opset 8 has an input more, and runs over batches.
        if node.op_type == "Scan" and graphs and len(graphs[0].inputs) == len(node.inputs):
            states = len(node.inputs) - int_attr(node, "num_scan_inputs", 0)
            for i, (given, value) in enumerate(zip(node.inputs, graphs[0].inputs, strict=True)):
                count = self._axes_of(given)
                if count is not None:
                    self.axes[value] = count - (i >= states)
        return graphs

    def _axes_of(self, value: ir.Value | None) -> Count:
        tensor = constant(value)
        if tensor is not None:
            return len(tensor.shape)
        return None if value is None else self.axes.get(value)

    def _length_of(self, value: ir.Value | None) -> Count:
        tensor = constant(value)
        if tensor is not None:
            return tensor.size if len(tensor.shape) == 1 else None
        return None if value is None else self.lengths.get(value)

    def _count(self, node: ir.Node) -> Count:
        op = node.op_type
        if op in _OWN:
            return _OWN[op]
        if op in _SHAPED:
            return self._shaped(node)
        counts = [self._axes_of(value) for value in node.inputs]
        if op in _REDUCING or op in ("Squeeze", "Unsqueeze"):
            return self._named(node, counts[0])
        if op in _KEPT or op in ("ArgMax", "ArgMin"):
            dropped = op.startswith("Arg") and not int_attr(node, "keepdims", 1)
            return None if counts[0] is None else counts[0] - dropped
        known = [count for count in counts if count is not None]
        if len(known) < max(1, len(counts)):
            return None
        if op in _SPREAD:
            return max(known)
        if op == "MatMul":
            return max(known) - known.count(1) if max(known) > 1 else 0
        if op == "Gather":
            return known[0] + known[1] - 1
        return known[0] + 1 if op == "OneHot" else None

    def _shaped(self, node: ir.Node) -> Count:
        asked = self._length_of(node.inputs[-1])
        own = self._axes_of(node.inputs[0])
        if node.op_type != "Expand" or asked is None:
            return asked
        return None if own is None else max(own, asked)

    def _named(self, node: ir.Node, count: Count) -> Count:
        """Behind what drops the axes that are named, all where none are, or puts in some."""
        if count is None or (node.op_type in _REDUCING and int_attr(node, "keepdims", 1)):
            return count
        axes: Sequence[int] = ints_attr(node, "axes", ())
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            given = constant(node.inputs[1])
            if given is None:
                return None
            axes = given.numpy().ravel().tolist()
        if node.op_type == "Unsqueeze":
            return count + len(axes)
        if axes:  # runtimes take one that is named twice
            return count - len({axis % count for axis in axes}) if count else None
        if node.op_type == "Squeeze":
            return None
        return count if int_attr(node, "noop_with_empty_axes", 0) else 0

    def _length(self, node: ir.Node) -> Count:
        """Of a list that a node makes, as far as exporters put shapes together."""
        op, inputs = node.op_type, node.inputs
        if op == "Shape":
            whole = "start" not in node.attributes and "end" not in node.attributes
            return self._axes_of(inputs[0]) if whole else None
        if op == "Unsqueeze":
            return 1
        if op in ("Cast", "Identity"):
            return self._length_of(inputs[0])
        if op == "Gather":
            return self._length_of(inputs[1])
        lengths = [self._length_of(v) for v in inputs if self._axes_of(v) != 0]
        known = [length for length in lengths if length is not None]
        if len(known) < max(1, len(lengths)):
            return None
        if op == "Concat":
            return sum(known)
        return max(known) if op in _SPREAD else None
