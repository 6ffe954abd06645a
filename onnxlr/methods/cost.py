"""What a chain costs, counted on nodes that go into no model; and the error of its weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.decompose import outer_and_inner
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.macs import HEAVY, operator_macs
from onnxlr.layers.siblings import share_of
from onnxlr.methods.base import GraphPass
from onnxlr.methods.writer import AttributeValue, Write
from onnxlr.types import Rank, Shape

# Orders of magnitude: a core at 20 GMAC/s and 2.5 billion floats a second, 2 µs an operator.
_MACS_A_MS = 2e7
_ELEMENTS_A_MS = 2.5e6
_MS_A_NODE = 2e-3
_FREE = ("Reshape", "Squeeze", "Unsqueeze", "Identity")  # no element of them is moved

_ROUNDING = 1e-12  # of a share
_OPSET = 17  # of counted nodes: the shapes of these operators mean the same in every opset


def chain_params(layer: Layer, graph_pass: GraphPass, rank: Rank) -> int:
    """Number of elements that the factors store; of a factor in common the layer's share."""
    shapes = graph_pass.factor_shapes(layer, rank)
    params = sum(math.prod(shape) for shape in shapes)
    if not graph_pass.shares:
        return params
    common = math.prod(shapes[common_factor(graph_pass, layer)])
    return params - common + math.ceil(share_of(layer) * common)


def common_factor(graph_pass: GraphPass, layer: Layer) -> int:
    """Which factor siblings have in common, for a method that shares: that of the inputs."""
    form = graph_pass.form(layer)
    assert form is not None
    return outer_and_inner(form)[1]


@dataclass(frozen=True)
class Work:
    """What nodes have to do: multiply-accumulates, elements read and written, and their number."""

    macs: int
    elements: int
    nodes: int

    @property
    def usual_ms(self) -> float:
        """Roughly what a core of a present-day CPU takes for it; nothing is measured."""
        return self.macs / _MACS_A_MS + self.elements / _ELEMENTS_A_MS + self.nodes * _MS_A_NODE

    def part(self, share: float) -> "Work":
        """A share of it, rounded up."""
        parts = (
            math.ceil(share * count * (1 - _ROUNDING))
            for count in (self.macs, self.elements, self.nodes)
        )
        return Work(*parts)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.macs + other.macs, self.elements + other.elements, self.nodes + other.nodes
        )


def layer_work(layer: Layer) -> Work | None:
    """Work of all users of a layer; None if a shape is unknown."""
    total = Work(0, 0, 0)
    for use in layer.uses:
        if not use.sized:
            return None
        moved = math.prod(use.x_shape or ()) + math.prod(use.y_shape or ()) + layer.params
        alone = replace(layer, uses=(use,))
        total += Work(alone.macs or 0, moved, 1)
    return total


def chain_work(layer: Layer, graph_pass: GraphPass, rank: Rank) -> Work | None:
    """Work of the chains that replace all users; None if a shape is unknown, or there are none.

    Of a product in common it is the layer's share. Both factors meet as many positions, so that it
    is as large a part of the work as of what is stored.
    """
    if not layer.uses:  # of those that count: the others are in bodies
        return Work(0, 0, 0)
    site = _CountingSite(graph_pass.factor_shapes(layer, rank))
    graph_pass.install(layer, rank, site)
    if site.work is None or not graph_pass.shares:
        return site.work
    sizes = [math.prod(shape) for shape in graph_pass.factor_shapes(layer, rank)]
    common = sizes[common_factor(graph_pass, layer)] / sum(sizes)
    return site.work.part(1 - (1 - share_of(layer)) * common)


def chain_macs(layer: Layer, graph_pass: GraphPass, rank: Rank) -> int | None:
    """Multiply-accumulates of what replaces all users; None if a shape is unknown."""
    if graph_pass.at_load:
        return layer.macs  # its users run on the whole weight
    work = chain_work(layer, graph_pass, rank)
    return None if work is None else work.macs


def weight_error(
    layer: Layer, graph_pass: GraphPass, rank: Rank, factors: tuple[NDArray[np.generic], ...]
) -> float:
    """‖W − Ŵ‖ / ‖W‖ in double precision, Ŵ the weight that the factors stand for.

    Given the factors as they are stored, their rounding to half precision counts too.
    """
    weight = layer.array().astype(np.float64)
    scale = float(np.abs(weight).max(initial=0.0))
    if scale == 0.0:
        return 0.0
    doubles = tuple(f.astype(np.float64) for f in factors)
    rest = graph_pass.compose(layer, rank, doubles) - weight
    # Divided first, so that neither 1e-200 nor 1e200 leaves the range when squared.
    return float(np.linalg.norm(rest / scale) / np.linalg.norm(weight / scale))


class _CountingSite:
    """Where chains are written to be counted (the ``Site`` of a pass)."""

    def __init__(self, factor_shapes: Sequence[Shape]) -> None:
        self.work: Work | None = Work(0, 0, 0)
        self._factor_shapes = factor_shapes

    def replace_use(self, use: Use, write: Write) -> None:
        """Count a chain; after one whose shapes are unknown nothing is counted any more."""
        if self.work is None or not use.sized:
            self.work = None
            return
        writer = _CountingWriter(use)
        write(tuple(map(_value, self._factor_shapes)), writer)
        self.work += writer.work

    def replace_input(self, use: Use, write: Write) -> None:
        """Count what comes in front of an operator, and what its smaller weight takes."""
        self.replace_use(use, write)
        if self.work is None or use.x_shape is None:
            return
        weight = math.prod(self._factor_shapes[-1])
        positions = math.prod(use.x_shape[:-1])
        self.work += Work(positions * weight, weight, 1)

    def replace_weight(self, write: Write) -> None:
        """Count nothing: a session computes the weight when it loads."""
        self.work = None


class _CountingWriter:
    """Infers the shapes of what a pass writes, node by node, and counts multiply-accumulates."""

    opset = _OPSET

    def __init__(self, use: Use) -> None:
        self.work = Work(0, 0, 0)
        self._shapes = {use.x: use.x_shape or ()}
        self._indices = {use.x} if use.node.op_type == "Gather" else set()
        self._data: dict[ir.Value, onnx.TensorProto] = {}

    def op(
        self, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, AttributeValue]
    ) -> ir.Value:
        """Add a node and return its output, whose shape is inferred."""
        if op_type == "Shape" and inputs[0] is not None:
            return self.constant(np.array(self._shape(inputs[0])), ir.DataType.INT64)
        if op_type in ("Slice", "Concat") and all(v in self._data for v in inputs):
            return self._computed(op_type, inputs)
        operands = tuple(None if v is None else self._operand(v) for v in inputs)
        settings = tuple((k, _hashable(a)) for k, a in sorted(attributes.items()))
        shape, kind = _inferred(op_type, operands, settings)
        macs = 0
        if op_type in HEAVY:
            x, w = (self._shape(v) for v in inputs[:2] if v is not None)
            flipped = bool(attributes.get("transA"))
            macs = operator_macs(op_type, x, w, shape, trans_a=flipped)
        if op_type not in _FREE:
            read = sum(math.prod(self._shape(v)) for v in inputs if v is not None)
            self.work += Work(macs, read + math.prod(shape), 1)
        output = _value(shape)
        if kind == onnx.TensorProto.INT64:
            self._indices.add(output)
        return output

    def constant(self, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        """Add a small constant, whose data shapes may depend on."""
        value = _value(array.shape)
        # Whatever type the model computes in, nodes are counted in float32.
        kind = np.float32 if dtype.is_floating_point() else dtype.numpy()
        self._data[value] = onnx.numpy_helper.from_array(array.astype(kind))
        return value

    def _computed(self, op_type: str, inputs: list[ir.Value | None]) -> ir.Value:
        """The result of an operator on constants: shapes that are put together as it runs."""
        data = [onnx.numpy_helper.to_array(self._data[v]) for v in inputs if v is not None]
        if op_type == "Concat":
            return self.constant(np.concatenate(data), ir.DataType.INT64)
        start, end = (int(bound[0]) for bound in data[1:3])
        return self.constant(data[0][start:end], ir.DataType.INT64)

    def _operand(self, value: ir.Value) -> "_Operand":
        shape = self._shape(value)
        if value in self._data:
            data = self._data[value]
            return data.data_type, shape, data.SerializeToString(deterministic=True)
        integers = value in self._indices
        return onnx.TensorProto.INT64 if integers else onnx.TensorProto.FLOAT, shape, None

    def _shape(self, value: ir.Value) -> Shape:
        if value in self._shapes:
            return self._shapes[value]
        # A bias of unknown shape doesn't change what is multiplied.
        return tuple(d if isinstance(d, int) else 1 for d in value.shape or (1,))


_Operand = tuple[int, Shape, bytes | None]  # type, shape, and the data of a constant


@lru_cache(maxsize=4096)  # the same nodes are counted again and again, in many candidates
def _inferred(
    op_type: str,
    operands: tuple[_Operand | None, ...],
    attributes: tuple[tuple[str, AttributeValue], ...],
) -> tuple[Shape, int]:
    """The shape and the type of what an operator makes of these operands."""
    names = ["" if operand is None else f"i{i}" for i, operand in enumerate(operands)]
    node = onnx.helper.make_node(op_type, names, ["o"])
    node.attribute.extend(onnx.helper.make_attribute(k, a) for k, a in attributes)
    named = [(n, o) for n, o in zip(names, operands, strict=True) if o is not None]
    inferred = onnx.shape_inference.infer_node_outputs(
        onnx.defs.get_schema(op_type, _OPSET),
        node,
        {n: onnx.helper.make_tensor_type_proto(kind, shape) for n, (kind, shape, _) in named},
        {n: onnx.TensorProto.FromString(data) for n, (_, _, data) in named if data is not None},
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=8,
    )["o"].tensor_type
    return tuple(d.dim_value for d in inferred.shape.dim), inferred.elem_type


def _hashable(value: AttributeValue) -> AttributeValue:
    return value if isinstance(value, str | int | float) else tuple(value)


def _value(shape: Shape) -> ir.Value:
    return ir.Value(shape=ir.Shape(shape))
