"""What a file must hold before anything is made of it: versions, names, weights, attributes."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor

from onnxlr.errors import ModelError
from onnxlr.model.protobuf import all_tensors, bodies_of, messages_in, tensor_nbytes

OLDEST_OPSET = 7
ONNX_DOMAINS = ("", "ai.onnx")
_MOST_AXES = 64  # NumPy's arrays have no more
_MOST_ELEMENTS = 2**48
# Type of an attribute → the field that holds its value, where that is a single one.
_SINGLE = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.TYPE_PROTO: "tp",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
}


def check_versions(proto: onnx.ModelProto, label: str) -> None:
    """Refuse what isn't a model, and opsets and IR versions outside the range."""
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{label} is not an ONNX model: it holds no graph or no opset")
    newest = onnx.defs.onnx_opset_version()
    standard = sorted({e.version for e in proto.opset_import if e.domain in ONNX_DOMAINS})
    if len(standard) > 1:
        raise ModelError(
            f"{label} imports the standard operators in opsets {standard}: it has to be one"
        )
    for entry in proto.opset_import:
        if entry.domain not in ONNX_DOMAINS:
            continue
        if entry.version > newest:
            raise ModelError(
                f"{label} uses opset {entry.version}, onnx {onnx.__version__} knows up to "
                f"{newest}: upgrade onnx and onnxruntime, or export at an older opset"
            )
        if entry.version < OLDEST_OPSET:
            raise ModelError(
                f"{label} uses opset {entry.version}, the oldest supported is {OLDEST_OPSET}: "
                "convert it with onnx.version_converter"
            )
    for function in proto.functions:
        for entry in function.opset_import:
            if entry.domain in ONNX_DOMAINS and not 1 <= entry.version <= newest:
                raise ModelError(
                    f"{label}: the local function {function.name!r} uses opset {entry.version}, "
                    f"onnx {onnx.__version__} knows 1 to {newest}: export the model again"
                )
    if proto.graph.sparse_initializer:
        raise ModelError(
            f"{label} stores {proto.graph.sparse_initializer[0].values.name!r} as a sparse "
            "initializer: not supported, store it dense"
        )
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{label} has IR version {proto.ir_version}, onnx {onnx.__version__} knows up to "
            f"{onnx.IR_VERSION}: upgrade onnx"
        )


def check_text(proto: onnx.ModelProto, label: str) -> None:
    """Refuse text that is no UTF-8, and weights without a name."""
    for text in _texts(proto):
        if isinstance(text, bytes):  # as protobuf gives what it can't decode
            raise ModelError(
                f"{label}: the name {text[:80]!r} is no UTF-8 text: repair it or export the model "
                "again"
            )
    for graph in _graphs(proto):
        for tensor in graph.initializer:
            if not tensor.name:
                raise ModelError(f"{label}: a weight of shape {list(tensor.dims)} has no name")


def _texts(proto: onnx.ModelProto) -> Iterator[str | bytes]:
    """Every text field of every message, weights' values left alone."""
    for message in messages_in(proto):
        if isinstance(message, onnx.TensorProto):
            yield from (message.name, message.doc_string)
            yield from (text for e in message.external_data for text in (e.key, e.value))
            continue
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_STRING:
                yield from (value,) if isinstance(value, (str, bytes)) else value


def check_tensors(proto: onnx.ModelProto, label: str) -> None:
    """Refuse tensors of no known type, and those whose data isn't as long as their shape says."""
    for tensor in all_tensors(proto):
        shape = f"the weight {tensor.name!r} of shape {list(tensor.dims)[:_MOST_AXES]}"
        axes = [d for d in tensor.dims if d]
        if any(d < 0 for d in axes) or len(tensor.dims) > _MOST_AXES:
            raise ModelError(
                f"{label}: {shape} and {len(tensor.dims)} axes is none: axes are 0 or longer, and "
                f"at most {_MOST_AXES}"
            )
        if math.prod(axes) > _MOST_ELEMENTS:
            raise ModelError(f"{label}: {shape} is larger than any memory")
        if (
            needed := tensor_nbytes(tensor)
        ) is None and tensor.data_type != onnx.TensorProto.STRING:
            raise ModelError(
                f"{label}: {shape} has type {tensor.data_type}, which this onnx doesn't know"
            )
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            continue
        if tensor.HasField("raw_data") and needed is not None:
            held, unit = len(tensor.raw_data), "bytes"
        else:
            field, needed = _field(tensor)
            held, unit = len(getattr(tensor, field)), f"values in {field}"
        if held != needed:
            raise ModelError(
                f"{label}: {shape} needs {needed:,} {unit} and has {held:,}: export the model again"
            )


def _field(tensor: onnx.TensorProto) -> tuple[str, int]:
    """The field that holds a tensor's values where they aren't raw, and how many there are."""
    count = math.prod(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return "string_data", count
    kind = ir.DataType(tensor.data_type)
    if kind.bitwidth < 6:  # several in a number
        count = -(-count * kind.bitwidth // 8)
    if kind in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        count *= 2
    return onnx.helper.tensor_dtype_to_field(tensor.data_type), count


def check_attributes(proto: onnx.ModelProto, label: str) -> None:
    """Refuse attributes that are there twice, without the value they promise, or of a wrong type.

    What type is right, and what has to be there, is known of standard operators.
    """
    for node, version, bound in _nodes(proto):
        where = f"{label}: {node.op_type[:80]} {node.name or '(unnamed)'!r}"
        seen: set[str] = set()
        for attribute in node.attribute:
            if attribute.name in seen:
                raise ModelError(f"{where} has the attribute {attribute.name!r} twice")
            seen.add(attribute.name)
            if attribute.ref_attr_name and not bound:
                raise ModelError(
                    f"{where} takes the attribute {attribute.name!r} of a function, and is in none"
                )
            field = _SINGLE.get(attribute.type)
            there = field is None or bool(attribute.ref_attr_name) or attribute.HasField(field)
            if attribute.type not in onnx.AttributeProto.AttributeType.values()[1:] or not there:
                raise ModelError(
                    f"{where} has the attribute {attribute.name!r} without a value of its type"
                )
        if node.domain not in ONNX_DOMAINS or not onnx.defs.has(node.op_type, version):
            continue
        schema: Any = onnx.defs.get_schema(node.op_type, version)
        for name, known in schema.attributes.items():
            if known.required and name not in seen:
                raise ModelError(f"{where} lacks the attribute {name!r}")
            given = next((a for a in node.attribute if a.name == name), None)
            if given is not None and given.type != known.type.value:
                raise ModelError(
                    f"{where} has the attribute {name!r} as "
                    f"{onnx.AttributeProto.AttributeType.Name(given.type)}, "
                    f"it has to be {known.type.name}"
                )
        if node.op_type == "Constant" and len(seen) != 1:
            raise ModelError(f"{where} has {len(seen)} values, it has to have one")


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all bodies, those in functions too."""
    waiting = [proto.graph, *(g for f in proto.functions for n in f.node for g in bodies_of(n))]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [g for n in graph.node for g in bodies_of(n)]


def _nodes(proto: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int, bool]]:
    """Every node, with the version of its standard operators, and whether it is in a function."""
    places: list[tuple[Iterable[onnx.NodeProto], int, bool]] = [
        (proto.graph.node, _version(proto.opset_import), False),
        *((f.node, _version(f.opset_import), True) for f in proto.functions),
    ]
    while places:
        nodes, version, bound = places.pop()
        for node in nodes:
            yield node, version, bound
            places += [(graph.node, version, bound) for graph in bodies_of(node)]


def _version(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    versions = [entry.version for entry in imports if entry.domain in ONNX_DOMAINS]
    newest = int(onnx.defs.onnx_opset_version())
    return min(newest, max(versions, default=OLDEST_OPSET))
