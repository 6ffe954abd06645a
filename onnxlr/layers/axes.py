"""How many axes values have, where every feed gives them the same number.

``x.squeeze()`` drops the batch where that is one, ``x[mask]`` and branches depend on values: what
one feed shows of them need not hold for the next. So the counts here follow from what operators
promise alone; an operator that promises nothing, or isn't listed here, leaves its outputs out.
"""

from collections.abc import Sequence

import onnx_ir as ir

from onnxlr.model.attributes import int_attr, ints_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard

Count = int | None

# The output has as many axes as the first input.
_LIKE_FIRST = (
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
# The output has as many axes as the input that has most: the others are broadcast to it.
_BROADCAST = (
    *("Add", "And", "BitShift", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor"),
)
_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
)
_BY_SIZES = ("Reshape", "Expand", "ConstantOfShape")  # an input lists the sizes, one for each axis
_CONSTANT = {"Flatten": 2, "Gemm": 2, "NonZero": 2, "Range": 1, "Shape": 1, "Size": 0}
_RECURRENT = {"GRU": (4, 3), "LSTM": (4, 3, 3), "RNN": (4, 3)}
_ALL_OUTPUTS = ("Split", "TopK")  # the count holds for all their outputs; else for the first alone


def axis_counts(graph: ir.Graph) -> dict[ir.Value, int]:
    """The number of axes of a graph's values; those that may have more or fewer are left out.

    Parameters
    ----------
    graph : onnx_ir.Graph
        The main graph, its nodes in order. Values of the bodies in it are counted too.
    """
    counter = _AxisCounter()
    for value in graph.inputs:
        if value.shape is not None:
            counter.axes[value] = len(value.shape)
            if len(value.shape) == 1 and isinstance(value.shape[0], int):
                counter.lengths[value] = value.shape[0]
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        for node in current:
            if is_standard(node, node.op_type):
                counter.visit(node)
                waiting += counter.bodies(node)
    return counter.axes


class _AxisCounter:
    """Numbers of axes by value, and lengths of lists: graphs hand sizes and axes on as lists."""

    def __init__(self) -> None:
        self.axes: dict[ir.Value, int] = {}
        self.lengths: dict[ir.Value, int] = {}

    def visit(self, node: ir.Node) -> None:
        """Count the axes of a node's outputs, once its inputs' are counted."""
        counts: Sequence[Count] = _RECURRENT.get(node.op_type, ())
        if not counts:
            outputs = len(node.outputs) if node.op_type in _ALL_OUTPUTS else 1
            counts = [self._output_axes(node)] * outputs
        for value, count in zip(node.outputs, counts, strict=False):
            if count is not None:
                self.axes[value] = count
        if counts[0] == 1 and (length := self._output_length(node)) is not None:
            self.lengths[node.outputs[0]] = length

    def bodies(self, node: ir.Node) -> list[ir.Graph]:
        """The bodies of a node, once the axes of their inputs are counted."""
        attributes = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        graphs = [a.as_graph() for a in attributes if not a.is_ref()]
        # A Scan of opset 8 has an input more, and runs over batches.
        if node.op_type == "Scan" and graphs and len(graphs[0].inputs) == len(node.inputs):
            states = len(node.inputs) - int_attr(node, "num_scan_inputs", 0)
            for i, (outer, inner) in enumerate(zip(node.inputs, graphs[0].inputs, strict=True)):
                count = self._axes_of(outer)
                if count is not None:
                    self.axes[inner] = count - (i >= states)
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

    def _output_axes(self, node: ir.Node) -> Count:
        """The number of axes of a node's first output."""
        op = node.op_type
        if op in _CONSTANT:
            return _CONSTANT[op]
        if op in _BY_SIZES:
            return self._axes_by_sizes(node)
        counts = [self._axes_of(value) for value in node.inputs]
        if op in _REDUCTIONS or op in ("Squeeze", "Unsqueeze"):
            return self._axes_by_list(node, counts[0])
        if op in _LIKE_FIRST or op in ("ArgMax", "ArgMin"):
            dropped = op.startswith("Arg") and not int_attr(node, "keepdims", 1)
            return None if counts[0] is None else counts[0] - dropped
        certain = [count for count in counts if count is not None]
        if len(certain) < max(1, len(counts)):
            return None
        if op in _BROADCAST:
            return max(certain)
        if op == "MatMul":
            return max(certain) - certain.count(1) if max(certain) > 1 else 0
        if op == "Gather":
            return certain[0] + certain[1] - 1
        return certain[0] + 1 if op == "OneHot" else None

    def _axes_by_sizes(self, node: ir.Node) -> Count:
        """The number of axes of an output whose sizes an input lists."""
        length = self._length_of(node.inputs[-1])
        count = self._axes_of(node.inputs[0])
        if node.op_type != "Expand" or length is None:
            return length
        return None if count is None else max(count, length)

    def _axes_by_list(self, node: ir.Node, count: Count) -> Count:
        """The number of axes of an output that lacks the listed axes, or gains them.

        Without a list a reduction drops all of the input's ``count`` axes.
        """
        if count is None or (node.op_type in _REDUCTIONS and int_attr(node, "keepdims", 1)):
            return count
        axes: Sequence[int] = ints_attr(node, "axes", ())
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            tensor = constant(node.inputs[1])
            if tensor is None:
                return None
            axes = tensor.numpy().ravel().tolist()
        if node.op_type == "Unsqueeze":
            return count + len(axes)
        if axes:  # runtimes take one that is listed twice
            return count - len({axis % count for axis in axes}) if count else None
        if node.op_type == "Squeeze":
            return None
        return count if int_attr(node, "noop_with_empty_axes", 0) else 0

    def _output_length(self, node: ir.Node) -> Count:
        """The length of a list that a node makes, as far as exporters put shapes together."""
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
        certain = [length for length in lengths if length is not None]
        if len(certain) < max(1, len(lengths)):
            return None
        if op == "Concat":
            return sum(certain)
        return max(certain) if op in _BROADCAST else None
