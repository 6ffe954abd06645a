"""Graphs and their nodes: attributes, constants, names, initializers added and removed."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError
from numpy.typing import NDArray

from onnxlr.errors import ModelError, one_line
from onnxlr.model.checks import (
    OLDEST_OPSET,
    ONNX_DOMAINS,
)

DEFAULT_VALUES_IR = (
    4  # IR version from which on a constant that is an input may be given another value
)
TRAINING_INFO = "onnxlr_training_info"


# What the graph library has to say of a broken model is told once, by the error.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())


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


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output; None for anything else."""
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or not is_standard(node, "Constant") or len(node.attributes) != 1:
        return None
    tensor = node.attributes.get("value")
    if tensor is not None and not tensor.is_ref():
        return tensor.as_tensor()  # the library's own way would give it the output's name
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:  # sparse constants
        return None


def int_attr(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.as_int()


def float_attr(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or its default."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.as_float()


def ints_attr(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A list-of-integers attribute, or its default."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else tuple(attr.as_ints())


def str_attr(node: ir.Node, name: str, default: str) -> str:
    """A string attribute, or its default."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.as_string()


def auto_pad(node: ir.Node) -> str:
    """How a convolution is padded; an empty word is none, as ONNX Runtime has it."""
    return str_attr(node, "auto_pad", "") or "NOTSET"


def count_params(model: ir.Model) -> int:
    """Number of floating-point and quantized weight elements, each stored tensor counted once.

    Initializers and Constant nodes of every graph and function count; integers of more than
    8 bits (indices, shapes) don't.
    """
    total = 0
    for graph in all_graphs(model):
        total += sum(_weight_size(v.const_value) for v in graph.initializers.values())
    nodes = list(model.graph.all_nodes())
    nodes += [n for function in model.functions.values() for n in function.all_nodes()]
    for node in nodes:
        if is_standard(node, "Constant"):
            total += _weight_size(constant(node.outputs[0]))
    return total


def _weight_size(tensor: ir.TensorProtocol | None) -> int:
    if tensor is None:
        return 0
    kind = tensor.dtype
    counts = kind.is_floating_point() or (kind.is_integer() and kind.bitwidth <= 8)
    return int(tensor.size) if counts else 0


class Names:
    """Hands out names that nothing in a model has: tensors and nodes share one pool."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        for graph in all_graphs(model):
            self._taken.update(v.name for v in graph.inputs if v.name)
            self._taken.update(graph.initializers)
        for node in model.graph.all_nodes():
            self._taken.update(v.name for v in node.outputs if v.name)
            self._taken.add(node.name or "")

    def unused(self, name: str) -> str:
        """The name itself, or with the first number that makes it unique; taken from now on."""
        candidate, i = name, 1
        while candidate in self._taken:
            candidate, i = f"{name}_{i}", i + 1
        self._taken.add(candidate)
        return candidate


@dataclass(frozen=True, eq=False)
class ArrayFile:
    """An array in a file, read when it is asked for."""

    path: Path
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    def array(self) -> NDArray[np.generic]:
        """What the file holds."""
        return np.fromfile(self.path, np.uint8).view(self.dtype).reshape(self.shape)


def add_initializer(
    graph: ir.Graph,
    name: str,
    array: NDArray[np.generic] | ArrayFile,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Register a new initializer, stored as ``dtype`` (by default the array's own type).

    One in a file stays there until the model is written.
    """
    stored = dtype or ir.DataType.from_numpy(array.dtype)
    tensor: ir.TensorProtocol
    if isinstance(array, ArrayFile):
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(array.array(), dtype=stored),
            dtype=stored,
            shape=ir.Shape(array.shape),
            name=name,
        )
    else:
        with np.errstate(over="ignore"):  # factors of what is near the largest number may pass it
            values = np.ascontiguousarray(array, dtype=stored.numpy())
        tensor = ir.Tensor(values, dtype=stored, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(stored), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def copy_metadata(old: ir.Value, new: ir.Value) -> None:
    """Keep what a value carries besides its name, type and shape."""
    new.meta.update(old.meta)
    new.metadata_props.update(old.metadata_props)
    new.doc_string = old.doc_string


def remove_unused(values: Sequence[ir.Value]) -> None:
    """Drop the initializers and nodes among these values' sources that nothing uses any more."""
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


def values_of(tensor: ir.TensorProtocol) -> NDArray[np.generic]:
    """A tensor's values; those of external data are read, and their file is let go of."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy())
    try:
        return np.array(tensor.numpy())
    except (OSError, ValueError) as error:  # it went, or was cut short, since it was checked
        raise ModelError(f"can't read the weight {tensor.name!r}: {one_line(error)}") from None
    finally:
        with contextlib.suppress(BufferError):  # still looked at elsewhere
            tensor.release()


def to_float64(tensor: ir.TensorProtocol) -> NDArray[np.float64]:
    """A tensor's values in double precision."""
    with np.errstate(invalid="ignore"):  # NaN of any kind stays NaN
        return values_of(tensor).astype(np.float64)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize, with what the graph library can't hold and without what it adds.

    It adds descriptions of initializers to ``value_info``, and has no place for training
    information.
    """
    proto = ir.to_proto(model)
    proto.training_info.extend(model.graph.meta.get(TRAINING_INFO, ()))
    stored = {t.name for t in proto.graph.initializer}
    kept = [v for v in proto.graph.value_info if v.name not in stored]
    if len(kept) != len(proto.graph.value_info):
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
    return proto


def serialize(proto: onnx.ModelProto, label: str) -> bytes:
    """Deterministic bytes of a model; ``ModelError`` past protobuf's 2 GB."""
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (ValueError, EncodeError):
        raise ModelError(
            f"{label} is past protobuf's 2 GB: save it with its weights as external data"
        ) from None
