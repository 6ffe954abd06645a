"""Products of two factors, written in the place of an operator that multiplies a matrix."""

import numpy as np
import onnx_ir as ir

from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.writer import AttributeValue, Writer
from onnxlr.model.attributes import float_attr, int_attr


def write_product(
    layer: Layer, use: Use, factors: tuple[ir.Value, ...], writer: Writer
) -> ir.Value:
    """Write two nodes for a MatMul or Gemm whose weight is P·Q.

    Parameters
    ----------
    layer : Layer
    use : Use
        One of the layer's, by a MatMul or a Gemm.
    factors : tuple of onnx_ir.Value
        P (…, a, r) and Q (…, r, b), for the layer's (…, a, b).
    writer : Writer
    """
    p, q = factors
    # W = P·Q meets the data with the factor of the contracted axis first.
    first, second = (q, p) if use.contracts_last else (p, q)
    if use.node.op_type == "Gemm":
        return _gemm_pair(use, first, second, writer)
    # The first user's orientation is the stored one; another user may see it transposed.
    if use.swapped:
        order = (*range(len(layer.shape) - 2), len(layer.shape) - 1, len(layer.shape) - 2)
        first = writer.op("Transpose", [first], {"perm": order})
        second = writer.op("Transpose", [second], {"perm": order})
    if use.slot == 0:
        return writer.op("MatMul", [second, writer.op("MatMul", [first, use.x], {})], {})
    return writer.op("MatMul", [writer.op("MatMul", [use.x, first], {}), second], {})


def _gemm_pair(use: Use, first: ir.Value, second: ir.Value, writer: Writer) -> ir.Value:
    """Y = α·A'·W' + β·C through the hidden product; α, β and C stay on the last Gemm."""
    bias = list(use.node.inputs[2:])
    scales: dict[str, AttributeValue] = {
        "alpha": float_attr(use.node, "alpha", 1.0),
        "beta": float_attr(use.node, "beta", 1.0),
    }
    # C became optional in opset 11; before, a zero that broadcasts does nothing.
    no_bias: list[ir.Value | None] = (
        [] if writer.opset >= 11 else [writer.constant(np.zeros(1), use.dtype)]
    )
    # Seen as stored means not transposed, unless the node or a Transpose in between flips it.
    flip = int(use.swapped != use.weight_transposed)
    if use.slot == 0:
        data = int_attr(use.node, "transB", 0)
        hidden = writer.op("Gemm", [first, use.x, *no_bias], {"transA": flip, "transB": data})
        return writer.op("Gemm", [second, hidden, *bias], {"transA": flip, **scales})
    data = int_attr(use.node, "transA", 0)
    hidden = writer.op("Gemm", [use.x, first, *no_bias], {"transA": data, "transB": flip})
    return writer.op("Gemm", [hidden, second, *bias], {"transB": flip, **scales})
