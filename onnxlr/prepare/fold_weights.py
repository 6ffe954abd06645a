"""Folding weights that are computed from constants: what a layer multiplies by becomes its weight.

Exporters leave reshapes of packed weights in the graph, weight normalization, merged adapters. A
chain of such nodes is folded where that doesn't take more room than the constants it comes from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.operators import FLOATS, weight_slots
from onnxlr.layers.tracing import trace
from onnxlr.model.constants import constant
from onnxlr.model.folding import FOLDED, ConstantChain, FoldingError
from onnxlr.model.graph import (
    DEFAULT_VALUES_IR,
    Names,
    add_initializer,
    copy_metadata,
    is_standard,
    opset,
    remove_unused,
)


def fold_weights(model: ir.Model) -> int:
    """Fold every weight that is computed from constants, in place, and return their number.

    Weights that share constants, as the parts of a packed one, are folded together or not at all:
    each part alone would be stored beside the whole.
    """
    fixed = FixedNodes(model)
    names, version = Names(model), opset(model)
    count, seen = 0, set[ir.Value]()
    for weight in _computed_weights(model):
        if weight in seen or weight.producer() not in fixed.nodes:
            continue
        group = fixed.related(weight)
        seen.update(group)
        try:
            folded = [item for value in group if (item := _fold(value, version)) is not None]
        except FoldingError:
            continue
        freed = fixed.freed([item.value for item in folded])
        if sum(item.nbytes for item in folded) <= freed:
            for item in folded:
                item.install(model, names)
            count += len(folded)
    return count


def _computed_weights(model: ir.Model) -> Iterator[ir.Value]:
    """The weights of layers that are more than views of stored constants."""
    for node in model.graph.all_nodes():
        slots, kind = weight_slots(node)
        for slot in slots:
            value = node.inputs[slot] if slot < len(node.inputs) else None
            origin = None if value is None or kind == "quantized" else trace(value)
            if value is not None and origin is not None and origin.reason is not None:
                yield value


class FixedNodes:
    """The nodes of a model that compute with constants alone, and that are known how to fold.

    Attributes
    ----------
    nodes : dict of onnx_ir.Node to None
        In the order in which they run.
    """

    def __init__(self, model: ir.Model) -> None:
        self._overridable = model.ir_version >= DEFAULT_VALUES_IR
        self.nodes: dict[ir.Node, None] = {}
        for node in model.graph.all_nodes():
            if is_standard(node, *FOLDED) and all(map(self._is_fixed, node.inputs)):
                self.nodes[node] = None

    def _is_fixed(self, value: ir.Value | None) -> bool:
        return value is None or self.is_stored(value) or value.producer() in self.nodes

    def is_stored(self, value: ir.Value) -> bool:
        """Whether a value is a constant in whose place no caller may feed another."""
        return constant(value) is not None and not (self._overridable and value.is_graph_input())

    def related(self, weight: ir.Value) -> list[ir.Value]:
        """What fixed nodes hand to others, of all that share large constants with a weight."""
        handed: dict[ir.Value, None] = {weight: None}
        waiting, visited = [weight], {weight}
        while waiting:
            value = waiting.pop()
            producer = value.producer()
            near = [*producer.inputs, *producer.outputs] if producer in self.nodes else []
            for node in dict.fromkeys(user for user, _ in value.uses()):
                if node in self.nodes:
                    near += [*node.inputs, *node.outputs]
                elif producer in self.nodes:
                    handed[value] = None
            for other in near:
                if other is not None and other not in visited and _links(other):
                    visited.add(other)
                    waiting.append(other)
        return list(handed)

    def freed(self, folded: Sequence[ir.Value]) -> int:
        """Bytes of the constants that nobody needs once these values are stored."""
        gone: set[ir.Node] = set()
        stored, replaced = dict[ir.Value, None](), set(folded)

        def is_unread(value: ir.Value) -> bool:
            return not value.is_graph_output() and all(node in gone for node, _ in value.uses())

        for node in reversed(self.nodes):
            if all(v in replaced or is_unread(v) for v in node.outputs):
                gone.add(node)
                stored.update((v, None) for v in node.inputs if v is not None)
        tensors = [constant(v) for v in stored if is_unread(v)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _links(value: ir.Value) -> bool:
    """Whether what is computed from a value belongs together: not by a shared scalar or an axis."""
    tensor = constant(value)
    return tensor is None or (tensor.dtype in FLOATS and tensor.size > 1)


@dataclass(frozen=True, eq=False)
class _Folded:
    """A value as it will be stored: in a narrower type, with a Cast behind, where that is exact."""

    value: ir.Value
    stem: str
    tensor: ir.LazyTensor
    dtype: ir.DataType

    @property
    def nbytes(self) -> int:
        return int(self.tensor.nbytes)

    def install(self, model: ir.Model, names: Names) -> None:
        """Store the tensor, and have all users of the value read that."""
        value, node = self.value, self.value.producer()
        assert node is not None
        stored = add_initializer(model.graph, names.unused(f"{self.stem}/folded"), self.tensor)
        replacement = stored
        if self.tensor.dtype != self.dtype:
            cast = ir.node("Cast", [stored], {"to": int(self.dtype)})
            cast.name = names.unused(f"{stored.name}_cast")
            replacement = cast.outputs[0]
            replacement.name = names.unused(f"{stored.name}_wide")
            replacement.type, replacement.shape = ir.TensorType(self.dtype), stored.shape
            assert node.graph is not None
            node.graph.insert_before(node, cast)
        copy_metadata(value, stored)
        value.replace_all_uses_with(replacement)
        remove_unused([value])


def _fold(value: ir.Value, version: int) -> _Folded | None:
    """Compute a value; None if it holds no real numbers, as shapes that are read off a weight.

    Raises
    ------
    FoldingError
        If it can't be computed or isn't finite, or is an output of the graph.
    """
    chain = ConstantChain(value, version)
    array = chain.evaluate()
    if array.dtype.kind != "f":
        return None
    if value.is_graph_output() or not np.isfinite(array).all():
        raise FoldingError
    stored = next((t for t in chain.narrower_types() if _is_exact(array, t)), chain.dtype)
    tensor = ir.LazyTensor(  # computed again when it is needed: models may be larger than memory
        lambda: ir.Tensor(_rounded(chain.evaluate(), stored), dtype=stored),
        dtype=stored,
        shape=ir.Shape(array.shape),
    )
    return _Folded(value, chain.largest.name or "weight", tensor, chain.dtype)


def _rounded(array: NDArray[np.generic], dtype: ir.DataType) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):
        return array.astype(dtype.numpy())


def _is_exact(array: NDArray[np.generic], dtype: ir.DataType) -> bool:
    """Whether a type holds these numbers as they are."""
    return np.array_equal(_rounded(array, dtype).astype(array.dtype), array)
