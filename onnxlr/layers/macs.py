"""Multiply-accumulates of a model's heavy operators."""

import math
from collections.abc import Iterator

import onnx_ir as ir

from onnxlr.layers.tracing import Trace, trace
from onnxlr.model.attributes import int_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard
from onnxlr.types import Shape, Shapes

HEAVY = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def heavy_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the main graph whose multiply-accumulates count."""
    for node in model.graph:
        if is_standard(node, *HEAVY):
            yield node


def operator_macs(op_type: str, x: Shape, w: Shape, y: Shape, *, trans_a: bool) -> int:
    """Multiply-accumulates of a ``HEAVY`` operator from the shapes of its inputs and its output."""
    if op_type == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if op_type == "Conv":
        return math.prod(y) * math.prod(w[1:])
    return math.prod(y) * (x[0] if trans_a else x[-1])


def count_macs(model: ir.Model, shapes: Shapes) -> int:
    """Multiply-accumulates of every MatMul, Gemm, Conv and ConvTranspose in the main graph.

    Products of two activations count too. Nodes whose shapes are unknown don't, nor what is
    computed of constants alone, when a session loads.
    """
    total = 0
    for node in heavy_nodes(model):
        x, w, y = (
            shape_of(v, model.graph, shapes)
            for v in (node.inputs[0], node.inputs[1], node.outputs[0])
        )
        once = all(is_fixed(trace(v)) for v in node.inputs[:2])
        if once or x is None or w is None or y is None:
            continue
        flipped = bool(int_attr(node, "transA", 0))
        total += operator_macs(node.op_type, x, w, y, trans_a=flipped)
    return total


def is_fixed(seen: Trace | None) -> bool:
    """Whether a value is of a constant alone, in whose place no caller feeds another."""
    return seen is not None and not seen.root.is_graph_input()


def shape_of(value: ir.Value | None, graph: ir.Graph, shapes: Shapes) -> Shape | None:
    """The static shape of a value, where it is known.

    The names that have shapes are the main graph's: a body may have its own values of these names,
    if they aren't in its sight.
    """
    tensor = constant(value)
    if tensor is not None:
        return tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    if value is None or value.graph is not graph:
        return None
    return shapes.get(value.name or "")
