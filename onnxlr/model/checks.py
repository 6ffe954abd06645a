"""Checks of a model's protocol buffer: versions, names, weights and attributes of nodes."""

import math
from collections.abc import Iterable, Iterator, Mapping
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
# For attributes that hold a single value: the field that holds it, by the attribute's type.
_VALUE_FIELDS = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.TYPE_PROTO: "tp",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
}


def check_versions(proto: onnx.ModelProto, label: str) -> None:
    """Refuse files that are no model, and opsets and IR versions that aren't supported.

    Raises
    ------
    ModelError
        It says which version is needed, or what to do.
    """
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
    """Refuse text that is no UTF-8, and weights without a name.

    Raises
    ------
    ModelError
        For the first of them.
    """
    for text in _texts(proto):
        if isinstance(text, bytes):  # so protobuf returns text that it can't decode
            raise ModelError(
                f"{label}: the name {text[:80]!r} is no UTF-8 text: repair it or export the model "
                "again"
            )
    for graph in _graphs(proto):
        for tensor in graph.initializer:
            if not tensor.name:
                raise ModelError(f"{label}: a weight of shape {list(tensor.dims)} has no name")


def _texts(proto: onnx.ModelProto) -> Iterator[str | bytes]:
    """The text fields of all messages, except the values of tensors of strings."""
    for message in messages_in(proto):
        if isinstance(message, onnx.TensorProto):
            yield from (message.name, message.doc_string)
            yield from (text for e in message.external_data for text in (e.key, e.value))
            continue
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_STRING:
                yield from (value,) if isinstance(value, (str, bytes)) else value


def check_tensors(proto: onnx.ModelProto, label: str) -> None:
    """Refuse tensors of unknown type, and those whose data isn't as long as their shape says.

    Data in external files is checked by ``external_files``.

    Raises
    ------
    ModelError
        For the first of them.
    """
    for tensor in all_tensors(proto):
        shape = f"the weight {tensor.name!r} of shape {list(tensor.dims)[:_MOST_AXES]}"
        axes = [d for d in tensor.dims if d]
        if any(d < 0 for d in axes) or len(tensor.dims) > _MOST_AXES:
            raise ModelError(
                f"{label}: {shape} and {len(tensor.dims)} axes isn't valid: lengths are 0 or more, "
                f"and axes at most {_MOST_AXES}"
            )
        if math.prod(axes) > _MOST_ELEMENTS:
            raise ModelError(f"{label}: {shape} is larger than any memory")
        needed = tensor_nbytes(tensor)
        if needed is None and tensor.data_type != onnx.TensorProto.STRING:
            raise ModelError(
                f"{label}: {shape} has type {tensor.data_type}, which this onnx doesn't know"
            )
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            continue
        if tensor.HasField("raw_data") and needed is not None:
            length, unit = len(tensor.raw_data), "bytes"
        else:
            field, needed = _data_field(tensor)
            length, unit = len(getattr(tensor, field)), f"values in {field}"
        if length != needed:
            raise ModelError(
                f"{label}: {shape} needs {needed:,} {unit} and has {length:,}: "
                "export the model again"
            )


def _data_field(tensor: onnx.TensorProto) -> tuple[str, int]:
    """The field that holds a tensor's values where they aren't raw, and its number of entries."""
    count = math.prod(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return "string_data", count
    kind = ir.DataType(tensor.data_type)
    if kind.bitwidth < 6:  # one entry holds several values
        count = -(-count * kind.bitwidth // 8)
    if kind in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        count *= 2
    return onnx.helper.tensor_dtype_to_field(tensor.data_type), count


def check_attributes(proto: onnx.ModelProto, label: str) -> None:
    """Refuse attributes that are there twice, lack the value they announce, or are of a wrong type.

    For standard operators, the right type and whether an attribute is required are those of the
    operator's schema in onnx.

    Raises
    ------
    ModelError
        For the first of them.
    """
    for node, version, in_function in _nodes(proto):
        where = f"{label}: {node.op_type[:80]} {node.name or '(unnamed)'!r}"
        attributes: dict[str, onnx.AttributeProto] = {}
        for attribute in node.attribute:
            if attribute.name in attributes:
                raise ModelError(f"{where} has the attribute {attribute.name!r} twice")
            attributes[attribute.name] = attribute
            if attribute.ref_attr_name and not in_function:
                raise ModelError(
                    f"{where} takes the attribute {attribute.name!r} from a function, but is in "
                    "none"
                )
            if not _has_value(attribute):
                raise ModelError(
                    f"{where} has the attribute {attribute.name!r} without a value of its type"
                )
        if node.domain in ONNX_DOMAINS and onnx.defs.has(node.op_type, version):
            _check_schema(node, attributes, version, where)


def _has_value(attribute: onnx.AttributeProto) -> bool:
    """Whether an attribute's type exists, and the field of that type is set."""
    if attribute.type not in onnx.AttributeProto.AttributeType.values()[1:]:
        return False
    field = _VALUE_FIELDS.get(attribute.type)
    return field is None or bool(attribute.ref_attr_name) or attribute.HasField(field)


def _check_schema(
    node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto], version: int, where: str
) -> None:
    """Compare a standard operator's attributes with its schema."""
    schema: Any = onnx.defs.get_schema(node.op_type, version)
    for name, rule in schema.attributes.items():
        attribute = attributes.get(name)
        if rule.required and attribute is None:
            raise ModelError(f"{where} lacks the attribute {name!r}")
        if attribute is not None and attribute.type != rule.type.value:
            raise ModelError(
                f"{where} has the attribute {name!r} as "
                f"{onnx.AttributeProto.AttributeType.Name(attribute.type)}, "
                f"it has to be {rule.type.name}"
            )
    if node.op_type == "Constant" and len(attributes) != 1:
        raise ModelError(f"{where} has {len(attributes)} values, it has to have one")


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all bodies of nodes, also of those in functions."""
    stack = [proto.graph, *(g for f in proto.functions for n in f.node for g in bodies_of(n))]
    while stack:
        graph = stack.pop()
        yield graph
        stack += [g for n in graph.node for g in bodies_of(n)]


def _nodes(proto: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int, bool]]:
    """Every node, with the opset it is in, and whether it is in a function."""
    stack: list[tuple[Iterable[onnx.NodeProto], int, bool]] = [
        (proto.graph.node, _opset(proto.opset_import), False),
        *((f.node, _opset(f.opset_import), True) for f in proto.functions),
    ]
    while stack:
        nodes, version, in_function = stack.pop()
        for node in nodes:
            yield node, version, in_function
            stack += [(graph.node, version, in_function) for graph in bodies_of(node)]


def _opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    """Version of the standard operators, or the nearest that is supported."""
    versions = [entry.version for entry in imports if entry.domain in ONNX_DOMAINS]
    newest = int(onnx.defs.onnx_opset_version())
    return min(newest, max(versions, default=OLDEST_OPSET))
