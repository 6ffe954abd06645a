"""Graphs of a model: walking over them, unused names, and adding and removing initializers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.model.checks import OLDEST_OPSET, ONNX_DOMAINS

# Since this IR version, the value of an initializer that is an input too is a default: whoever
# runs the model may feed another.
DEFAULT_VALUES_IR = 4


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, then every subgraph of it."""
    yield model.graph
    yield from model.graph.subgraphs()


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is one of these operators of the standard domain."""
    return node.op_type in op_types and node.domain in ONNX_DOMAINS


def opset(model: ir.Model) -> int:
    """Version of the standard operator set that the model imports."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", OLDEST_OPSET))


class Names:
    """The names in a model, for choosing new ones; tensors and nodes share one namespace."""

    def __init__(self, model: ir.Model) -> None:
        self._names: set[str] = set()
        for graph in all_graphs(model):
            self._names.update(v.name for v in graph.inputs if v.name)
            self._names.update(graph.initializers)
        for node in model.graph.all_nodes():
            self._names.update(v.name for v in node.outputs if v.name)
            self._names.add(node.name or "")

    def unused(self, name: str) -> str:
        """The name, or the name with the first number that makes it new; used from now on."""
        candidate, i = name, 1
        while candidate in self._names:
            candidate, i = f"{name}_{i}", i + 1
        self._names.add(candidate)
        return candidate


@dataclass(frozen=True, eq=False)
class ArrayFile:
    """A file that holds the bytes of an array, which is read when it is needed."""

    path: Path
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    def array(self) -> NDArray[np.generic]:
        """Read the array."""
        return np.fromfile(self.path, np.uint8).view(self.dtype).reshape(self.shape)


def add_initializer(
    graph: ir.Graph,
    name: str,
    array: NDArray[np.generic] | ArrayFile | ir.LazyTensor,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Register a new initializer, stored as ``dtype`` (by default the array's own type).

    An array in a file stays there until the model is written; so does a tensor that is computed.
    """
    tensor: ir.TensorProtocol
    if isinstance(array, ir.LazyTensor):
        stored, tensor = array.dtype, array
        tensor.name = name
    elif isinstance(array, ArrayFile):
        stored = dtype or ir.DataType.from_numpy(array.dtype)
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(array.array(), dtype=stored),
            dtype=stored,
            shape=ir.Shape(array.shape),
            name=name,
        )
    else:
        stored = dtype or ir.DataType.from_numpy(array.dtype)
        with np.errstate(over="ignore"):  # factors of huge weights may exceed the largest number
            values = np.asarray(array, dtype=stored.numpy(), order="C")  # a scalar stays one
        tensor = ir.Tensor(values, dtype=stored, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(stored), const_value=tensor
    )
    graph.register_initializer(value)
    return value


Described = ir.Value | ir.Node | ir.TensorProtocol


def copy_metadata(source: Described, target: Described | None) -> None:
    """Copy what a value, a node or a tensor carries besides what it is."""
    assert target is not None
    target.meta.update(source.meta)
    target.metadata_props.update(source.metadata_props)
    target.doc_string = source.doc_string


def remove_unused(values: Sequence[ir.Value]) -> None:
    """Remove these values where nothing uses them, with all nodes and initializers only they need.

    A value's source goes with it: its initializer, or the node that produces it once no output of
    the node is used.
    """
    queue = list(values)
    while queue:
        value = queue.pop()
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is None:
            graph = value.graph
            if isinstance(graph, ir.Graph) and value.name in graph.initializers:
                graph.initializers.pop(value.name or "")
                if value in graph.inputs:  # an initializer declared as an input as well
                    graph.inputs.remove(value)
        elif node.graph is not None and not any(v.uses() for v in node.outputs):
            queue += [v for v in node.inputs if v is not None]
            node.graph.remove(node, safe=True)
