"""The operators that hold weights, and the types that weights are stored in."""

from typing import Literal

import onnx_ir as ir

from onnxlr.model.graph import is_standard

# A table that is looked up and multiplied too, as in language models, is tied. What multiplies the
# first input of an operator that does more than that projects it.
Kind = Literal[
    "matrix",
    "conv",
    "conv-transpose",
    "gather",
    "tied",
    "projection",
    "recurrent",
    "quantized",
    "other",
]
# Of recurrent operators how many times a weight has as many rows as a state.
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
RECURRENT = tuple(GATES)
PROJECTING = (*RECURRENT, "Attention")

# Operator → which inputs may hold its weight, and what kind of layer that makes.
STANDARD: dict[str, tuple[tuple[int, ...], Kind]] = {
    "MatMul": ((1, 0), "matrix"),
    "Gemm": ((1, 0), "matrix"),
    "Conv": ((1,), "conv"),
    "ConvTranspose": ((1,), "conv-transpose"),
    "Gather": ((0,), "gather"),
    "LSTM": ((1, 2), "recurrent"),
    "GRU": ((1, 2), "recurrent"),
    "RNN": ((1, 2), "recurrent"),
    "ConvInteger": ((1,), "quantized"),
    "MatMulInteger": ((1, 0), "quantized"),
    "QLinearConv": ((3,), "quantized"),
    "QLinearMatMul": ((3, 0), "quantized"),
    "DeformConv": ((1,), "other"),
    "Einsum": ((0, 1, 2, 3), "other"),
}
MICROSOFT: dict[str, tuple[tuple[int, ...], Kind]] = {
    "FusedConv": ((1,), "other"),
    "FusedGemm": ((1,), "other"),
    "FusedMatMul": ((1, 0), "other"),
    "Attention": ((1,), "projection"),
    "QGemm": ((3,), "quantized"),
    "MatMulNBits": ((1,), "quantized"),
    "MatMulIntegerToFloat": ((1,), "quantized"),
    "DynamicQuantizeMatMul": ((1,), "quantized"),
    "DynamicQuantizeLSTM": ((1, 2), "quantized"),
    "MatMulBnb4": ((1,), "quantized"),
    "GatherBlockQuantized": ((0,), "quantized"),
    "QAttention": ((1,), "quantized"),
    "QEmbedLayerNormalization": ((2, 3, 4), "quantized"),
    "QLinearConv": ((3,), "quantized"),
}
FLOATS = (
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
)
QUANTIZED = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)


def weight_slots(node: ir.Node) -> tuple[tuple[int, ...], Kind]:
    """Inputs of a node that may hold its weight, and what kind of layer that makes."""
    if is_standard(node, *STANDARD):
        return STANDARD[node.op_type]
    if node.domain == "com.microsoft" and node.op_type in MICROSOFT:
        return MICROSOFT[node.op_type]
    return (), "other"


def kind_of_slot(kind: Kind, slot: int) -> Kind:
    """The kind of a weight at one of several inputs: the first of a recurrent operator projects."""
    return "projection" if kind == "recurrent" and slot == 1 else kind
