"""Chains of operators on constants: which ones are known, and what they give."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.model.attributes import int_attr
from onnxlr.model.constants import constant, values_of

_MOVING = (
    *("Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Split"),
    *("Slice", "Concat", "Gather", "Shape", "Expand", "ConstantOfShape"),
)
_COMPUTING = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Neg", "Abs", "Reciprocal", "Exp", "Max", "Min"),
    *("Floor", "Ceil", "Mod", "Equal"),
    *("Sum", "Clip", "Where", "MatMul", "Gemm", "LpNormalization", "ReduceL1", "ReduceL2"),
    *("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"),
)
FOLDED = (*_MOVING, *_COMPUTING)

_ROOM = 1 << 20  # elements that a step of a chain may have whatever the constants have
_TIMES = 4  # times the elements of all constants that it may have


class FoldingError(Exception):
    """What a chain gives can't be computed, or can't be stored."""


@dataclass(frozen=True, eq=False)
class _Step:
    """A node of a chain: its inputs and outputs are keys of the chain's values."""

    proto: onnx.NodeProto
    target: ir.DataType | None  # of a Cast


class ConstantChain:
    """The nodes that compute a value from constants alone, apart from the graph they are in.

    Real numbers are computed in double precision, whatever type the graph computes them in, and
    rounded where the graph casts them.

    Attributes
    ----------
    largest : onnx_ir.Value
        The constant with the most elements.
    dtype : onnx_ir.DataType
        The type of the value; known once it was evaluated.
    """

    def __init__(self, value: ir.Value, version: int) -> None:
        """The chain of a value, all of whose nodes are in ``FOLDED``, in a model of this opset.

        Raises
        ------
        FoldingError
            If it casts to what holds no numbers.
        """
        self._keys: dict[ir.Value, str] = {}
        self._tensors: dict[str, ir.TensorProtocol] = {}
        self._steps: list[_Step] = []
        self._opset = version
        self._last = self._key(value)
        roots = []
        for source in _sources(value):
            if (tensor := constant(source)) is not None:
                self._tensors[self._key(source)] = tensor
                roots.append((tensor.size, source))
            elif (node := source.producer()) is not None:
                self._add(node)
        self.largest = max(roots, key=lambda root: root[0])[1]
        self.dtype = ir.DataType.UNDEFINED
        self._room = max(_ROOM, _TIMES * sum(size for size, _ in roots))

    def _key(self, value: ir.Value) -> str:
        return self._keys.setdefault(value, str(len(self._keys)))

    def _add(self, node: ir.Node) -> None:
        proto = ir.to_proto(node)
        proto.input[:] = ["" if v is None else self._key(v) for v in node.inputs]
        proto.output[:] = [self._key(v) for v in node.outputs]
        target = _cast_target(node)
        self._steps.append(_Step(proto, target))

    def narrower_types(self) -> list[ir.DataType]:
        """Types of real numbers on the way that are narrower than the value's, narrowest first."""
        types = {tensor.dtype for tensor in self._tensors.values()}
        types.update(step.target for step in self._steps if step.target is not None)
        narrower = {
            t for t in types if t.is_floating_point() and 16 <= t.bitwidth < self.dtype.bitwidth
        }
        return sorted(narrower, key=lambda t: (t.bitwidth, int(t)))

    def evaluate(self) -> NDArray[np.generic]:
        """What the chain gives: real numbers in double precision.

        Raises
        ------
        FoldingError
            If a step fails, or would take far more room than all constants together.
        ModelError
            If external data can't be read.
        """
        arrays: dict[str, NDArray[Any]] = {}
        types: dict[str, ir.DataType] = {}
        for key, tensor in self._tensors.items():
            array = values_of(tensor)
            arrays[key] = array.astype(np.float64) if tensor.dtype.is_floating_point() else array
            types[key] = tensor.dtype
        for step in self._steps:
            self._run(step, arrays, types)
        self.dtype = types[self._last]
        return arrays[self._last]

    def _run(
        self, step: _Step, arrays: dict[str, NDArray[Any]], types: dict[str, ir.DataType]
    ) -> None:
        proto = step.proto
        inputs = {key: arrays[key] for key in proto.input if key}
        if _elements(proto.op_type, [*inputs.values()]) > self._room:
            raise FoldingError
        try:
            with np.errstate(all="ignore"):  # what isn't finite is noticed at the end
                outputs = _results(step, inputs, self._opset)
        except Exception as error:  # whatever a malformed node makes the evaluator raise
            raise FoldingError from error
        first = types[proto.input[1 if proto.op_type == "Where" else 0]]
        for key, output in zip(proto.output, outputs, strict=True):
            array, kept = np.asarray(output), step.target or first
            real = array.dtype.kind == "f"
            rounded = real and kept.is_floating_point()
            types[key] = kept if rounded else ir.DataType.from_numpy(array.dtype)
            arrays[key] = array.astype(np.float64) if real else array


def _cast_target(node: ir.Node) -> ir.DataType | None:
    """The type that a Cast gives; None for other operators."""
    if node.op_type != "Cast":
        return None
    try:
        target = ir.DataType(int_attr(node, "to", 1))
    except ValueError:  # no type of ONNX
        target = ir.DataType.UNDEFINED
    if target in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        raise FoldingError
    return target


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    """What a value is computed from: constants, and one output of each node, in running order."""
    done: set[object] = set()
    stack = [(value, False)]
    while stack:
        current, ready = stack.pop()
        node = current.producer()
        inner = constant(current) is None and node is not None
        identity: object = node if inner else current
        if ready:
            if identity not in done:
                done.add(identity)
                yield current
        elif identity not in done:
            stack.append((current, True))
            if inner and node is not None:
                stack += [(v, False) for v in node.inputs if v is not None]


def _elements(op_type: str, inputs: list[NDArray[Any]]) -> int:
    """At most so many elements come out of an operator; few of them give more than they get."""
    total = sum(a.size for a in inputs)
    if op_type == "MatMul" or op_type == "Gemm":
        return max(total, inputs[0].size * inputs[1].size)
    if op_type == "Expand":
        return int(np.prod(np.maximum(inputs[1], 1), dtype=float)) * max(1, inputs[0].size)
    if op_type == "ConstantOfShape":
        return int(np.prod(np.maximum(inputs[0], 1), dtype=float))
    if op_type == "Gather":
        return inputs[0].size * max(1, inputs[1].size)
    try:
        return max(total, math.prod(np.broadcast_shapes(*(a.shape for a in inputs))))
    except ValueError:  # these aren't broadcast
        return total


def _results(
    step: _Step, inputs: dict[str, NDArray[Any]], version: int
) -> list[NDArray[np.generic]]:
    """The outputs of a node."""
    if step.target is not None:
        (array,) = inputs.values()
        cast = array.astype(step.target.numpy())
        return [cast.astype(np.float64) if step.target.is_floating_point() else cast]
    proto = step.proto
    graph = onnx.helper.make_graph(
        [proto],
        "step",
        [onnx.helper.make_empty_tensor_value_info(key) for key in inputs],
        [onnx.helper.make_empty_tensor_value_info(key) for key in proto.output],
    )
    imports = [onnx.helper.make_opsetid("", version)]
    from onnx.reference import ReferenceEvaluator  # slow to import, and few models need it

    model = onnx.helper.make_model(graph, opset_imports=imports)
    return list(ReferenceEvaluator(model).run(None, inputs))
