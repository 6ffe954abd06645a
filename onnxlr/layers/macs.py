"""Multiply-accumulates of a model's heavy operators."""

import math
from collections.abc import Iterator

import onnx_ir as ir

from onnxlr.layers.operators import GATES, PROJECTING, RECURRENT
from onnxlr.layers.shapes import shape_of
from onnxlr.layers.tracing import is_fixed, trace
from onnxlr.model.attributes import int_attr, str_attr
from onnxlr.model.graph import is_standard
from onnxlr.types import Shape, Shapes

HEAVY = ("MatMul", "Gemm", "Conv", "ConvTranspose", *RECURRENT)


def heavy_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the main graph whose multiply-accumulates count."""
    for node in model.graph:
        if is_standard(node, "Einsum") and len(node.inputs) == 2:
            yield node
        attention = node.domain == "com.microsoft" and node.op_type == "Attention"
        if attention or is_standard(node, *HEAVY):
            yield node


def operator_macs(op_type: str, x: Shape, w: Shape, y: Shape, *, trans_a: bool) -> int:
    """Multiply-accumulates of a heavy operator by the shapes of its inputs and its output.

    Those of Attention are the projections, those of a recurrent operator both its products.
    """
    if op_type in RECURRENT:
        directions, gates, _ = w
        hidden = gates // GATES[op_type]
        return math.prod(x[:-1]) * (math.prod(w) + directions * gates * hidden)
    if op_type == "Attention":
        return math.prod(x[:-1]) * math.prod(w)
    if op_type == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if op_type == "Conv":
        return math.prod(y) * math.prod(w[1:])
    return math.prod(y) * (x[0] if trans_a else x[-1])


def _einsum_macs(node: ir.Node, x: Shape, w: Shape, y: Shape) -> int:
    """Multiply-accumulates of a product of two: as many as all letters have values together."""
    left, _, out = str_attr(node, "equation", "").replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, shape in zip((*left.split(","), out), (x, w, y), strict=False):
        first, dots, last = term.partition("...")
        if (len(first) + len(last) > len(shape)) or (not dots and len(first) != len(shape)):
            continue  # a result that isn't spelled out
        middle = shape[len(first) : len(shape) - len(last)]
        sizes |= dict(zip(first, shape, strict=False))
        sizes |= dict(zip(reversed(last), reversed(shape), strict=False))
        sizes["..."] = max(sizes.get("...", 1), math.prod(middle))
    return math.prod(sizes.values())


def count_macs(model: ir.Model, shapes: Shapes) -> int:
    """Multiply-accumulates of every heavy operator in the main graph.

    Products of two activations count too. Nodes of unknown shapes don't, nor does what a session
    computes from constants alone while it loads.
    """
    total = 0
    for node in heavy_nodes(model):
        x, w, y = (
            shape_of(v, model.graph, shapes)
            for v in (node.inputs[0], node.inputs[1], node.outputs[0])
        )
        once = all(is_fixed(trace(v)) for v in node.inputs[:2])
        if node.op_type in PROJECTING:  # whose inputs tell all
            y = ()
        if once or x is None or w is None or y is None:
            continue
        if node.op_type == "Einsum":
            total += _einsum_macs(node, x, w, y)
            continue
        flipped = bool(int_attr(node, "transA", 0))
        total += operator_macs(node.op_type, x, w, y, trans_a=flipped)
    return total
