"""What a chain costs: its nodes are written onto paper, and their work is counted."""

import math
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.graph_pass import AttributeValue, GraphPass, Rank
from onnxlr.layers import HEAVY, Layer, Shape, Use, operator_macs

_OPSET = 17  # of the paper: the shapes of these operators mean the same in every opset


def chain_params(layer: Layer, graph_pass: GraphPass, rank: Rank) -> int:
    """Number of elements that the factors store."""
    return sum(math.prod(shape) for shape in graph_pass.factor_shapes(layer, rank))


def chain_macs(layer: Layer, graph_pass: GraphPass, rank: Rank) -> int | None:
    """Multiply-accumulates of the chains that replace all users; None if a shape is unknown."""
    total = 0
    for use in layer.uses:
        if use.x_shape is None or use.y_shape is None:
            return None
        writer = _PaperWriter(use)
        factors = tuple(_value(shape) for shape in graph_pass.factor_shapes(layer, rank))
        graph_pass.write(layer, use, rank, factors, writer)
        total += writer.macs
    return total


class _PaperWriter:
    """Infers the shapes of what a pass writes, node by node, and counts multiply-accumulates."""

    opset = _OPSET

    def __init__(self, use: Use) -> None:
        self.macs = 0
        self._shapes = {use.x: use.x_shape or ()}
        self._indices = {use.x} if use.node.op_type == "Gather" else set()
        self._data: dict[ir.Value, onnx.TensorProto] = {}

    def op(
        self, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, AttributeValue]
    ) -> ir.Value:
        """Add a node and return its output, of known shape."""
        if op_type == "Shape" and inputs[0] is not None:
            return self.constant(np.array(self._shape(inputs[0])), ir.DataType.INT64)
        names = {v: f"i{i}" for i, v in enumerate(inputs) if v is not None}
        node = onnx.helper.make_node(
            op_type,
            ["" if v is None else names[v] for v in inputs],
            ["o"],
        )
        node.attribute.extend(onnx.helper.make_attribute(k, a) for k, a in attributes.items())
        types = {
            name: onnx.helper.make_tensor_type_proto(
                self._data[v].data_type
                if v in self._data
                else onnx.TensorProto.INT64
                if v in self._indices
                else onnx.TensorProto.FLOAT,
                self._shape(v),
            )
            for v, name in names.items()
        }
        inferred = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(op_type, _OPSET),
            node,
            types,
            {names[v]: data for v, data in self._data.items() if v in names},
            opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
            ir_version=8,
        )["o"]
        shape = tuple(d.dim_value for d in inferred.tensor_type.shape.dim)
        if op_type in HEAVY:
            x, w = (self._shape(v) for v in inputs[:2] if v is not None)
            flipped = bool(attributes.get("transA"))
            self.macs += operator_macs(op_type, x, w, shape, trans_a=flipped)
        return _value(shape)

    def constant(self, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        """Add a small constant, whose data shapes may depend on."""
        value = _value(array.shape)
        self._data[value] = onnx.numpy_helper.from_array(array.astype(dtype.numpy()))
        return value

    def _shape(self, value: ir.Value) -> Shape:
        if value in self._shapes:
            return self._shapes[value]
        # A bias of unknown shape doesn't change what is multiplied.
        return tuple(d if isinstance(d, int) else 1 for d in value.shape or (1,))


def _value(shape: Shape) -> ir.Value:
    return ir.Value(shape=ir.Shape(shape))
