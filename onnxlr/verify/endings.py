"""The operators at the end of each output, which tell class scores from embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnxlr.layers.tracing import trace
from onnxlr.model.attributes import int_attr

Kind = Literal[
    "softmax",
    "sigmoid",
    "linear",
    "convolution",
    "L2 norm",
    "layer norm",
    "pooling",
    "residual sum",
    "activation",
    "other",
]

_MOST_NODES = 200  # followed back from an output

# Operators that hand on what they read, in another order, shape, type or range.
_VIEWS = {
    *("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand"),
    *("Slice", "Split", "Concat", "Pad", "Gather", "Dropout", "Clip"),
    *("BatchNormalization", "QuantizeLinear", "DequantizeLinear"),
}
_LINEAR = {
    *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Einsum", "MatMulInteger", "MatMulNBits"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"),
}
_OPERATORS: dict[Kind, tuple[str, ...]] = {
    "softmax": ("Softmax", "LogSoftmax"),
    "L2 norm": ("LpNormalization",),
    "layer norm": (
        *("LayerNormalization", "SkipLayerNormalization", "RMSNormalization"),
        *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    ),
    "pooling": (
        *("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool"),
        *("ReduceMean", "ReduceMax", "ReduceSum"),
    ),
    "convolution": (
        *("Conv", "FusedConv", "ConvInteger", "QLinearConv", "ConvTranspose"),
        *("Resize", "Upsample", "DepthToSpace", "InstanceNormalization", "GroupNormalization"),
    ),
}
_KINDS = {op: kind for kind, ops in _OPERATORS.items() for op in ops}
_ACTIVATIONS: dict[str, Kind] = {
    **dict.fromkeys(("Sigmoid", "HardSigmoid"), "sigmoid"),
    **dict.fromkeys(("Tanh", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Gelu"), "activation"),
}


@dataclass(frozen=True)
class Ending:
    """What is last before an output, but for what only changes shapes, types and ranges.

    Attributes
    ----------
    kind : str
        ``sigmoid`` and ``activation`` are those of a linear layer, ``residual sum`` is the sum of
        two activations.
    widens : bool
        Whether a linear layer has more outputs than inputs.
    """

    kind: Kind
    widens: bool = False


def endings(model: ir.Model) -> Mapping[str, Ending]:
    """The ending of each output, by its name; functions should have been inlined."""
    return {value.name or "": _ending(value) for value in model.graph.outputs}


def _ending(output: ir.Value) -> Ending:
    value: ir.Value | None = output
    activated: Kind = "linear"
    for _ in range(_MOST_NODES):
        node = None if value is None else value.producer()
        if node is None:
            break
        op = node.op_type
        if op in _LINEAR:
            return _linear(node, activated)
        if op in _KINDS:
            return Ending(_KINDS[op])
        if op in _ACTIVATIONS:
            activated = activated if activated != "linear" else _ACTIVATIONS[op]
        elif op in ("Add", "Sub", "Mul", "Div"):
            kind, value = _arithmetic(node)
            if kind is not None:
                return Ending(kind)
            continue
        elif op not in _VIEWS:
            break
        value = _activation(node)
    return Ending("other")


def _activation(node: ir.Node) -> ir.Value | None:
    """The first input of a node that is no constant."""
    return next((v for v in node.inputs if v is not None and trace(v) is None), None)


def _arithmetic(node: ir.Node) -> tuple[Kind | None, ir.Value | None]:
    """What a node of arithmetic is the last of, or else the value that it shifts or scales."""
    sides = [v for v in node.inputs if v is not None and trace(v) is None]
    if len(sides) < 2:
        return None, next(iter(sides), None)
    if node.op_type == "Add":
        return "residual sum", None
    if node.op_type == "Div" or (node.op_type == "Mul" and _made_by(sides[1], "Reciprocal")):
        return _quotient(*sides), None
    return "other", None


def _quotient(above: ir.Value, below: ir.Value) -> Kind:
    """What is divided by a sum or by a norm, as exporters write normalizations in small parts."""
    below_ops = _chain(below)
    rooted = bool(below_ops & {"Sqrt", "Pow"})
    if "ReduceL2" in below_ops or (rooted and below_ops & {"ReduceSum", "ReduceSumSquare"}):
        return "L2 norm"
    if rooted and "ReduceMean" in below_ops:
        return "layer norm"
    if "ReduceSum" in below_ops and _made_by(above, "Exp"):
        return "softmax"
    if _made_by(above, "ReduceSum"):
        return "pooling"
    return "other"


def _chain(value: ir.Value | None) -> set[str]:
    """The operators on the way back from a divisor to the first sum or mean, that included."""
    ops: set[str] = set()
    for _ in range(_MOST_NODES):
        node = None if value is None else value.producer()
        if node is None:
            break
        ops.add(node.op_type)
        if node.op_type.startswith("Reduce"):
            break
        value = _activation(node)
    return ops


def _made_by(value: ir.Value, op: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type == op


def _linear(node: ir.Node, kind: Kind) -> Ending:
    """A product with a constant; of two activations it compares them, and is no layer."""
    if node.op_type == "MatMulNBits":
        inputs, outputs = int_attr(node, "K", 0), int_attr(node, "N", 0)
        return Ending(kind, 0 < inputs < outputs)
    seen = next((t for t in map(trace, node.inputs[1::-1]) if t is not None), None)
    if seen is None:
        return Ending("other")
    shape = seen.root.shape
    widens = False
    if shape is not None and shape.is_static() and len(shape) == 2 and node.op_type != "Einsum":
        inputs, outputs = (shape.numpy()[axis] for axis in (seen.perm or (0, 1)))
        if int_attr(node, "transB", 0):
            inputs, outputs = outputs, inputs
        widens = outputs > inputs
    return Ending(kind, widens)
