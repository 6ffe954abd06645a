"""ONNX protocol buffers: walking over their messages, and writing them as bytes."""

import math
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import EncodeError, Message

from onnxlr.errors import ModelError

PROTOBUF_LIMIT = 2**31 - 1  # bytes of one message
TRAINING_INFO = "onnxlr_training_info"  # where a graph's ``meta`` keeps the model's training_info
OTHER_TYPE = "onnxlr_type"  # where a value's ``meta`` keeps a type that onnx-ir doesn't know


def set_aside_types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    """Remove maps, in which classical models end, from the types of a graph's values.

    onnx-ir has no place for them. Returns them by the names of values.
    """
    others = {}
    for info in (*graph.input, *graph.output, *graph.value_info):
        if any(isinstance(m, onnx.TypeProto.Map) for m in messages_in(info.type)):
            others[info.name] = onnx.TypeProto()
            others[info.name].CopyFrom(info.type)
            info.ClearField("type")
    return others


def messages_in(*roots: Message) -> Iterator[Any]:
    """These messages and all messages within them, but none within a tensor."""
    stack = list(roots)
    while stack:
        message = stack.pop()
        yield message
        if isinstance(message, onnx.TensorProto):
            continue
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                stack += (value,) if isinstance(value, Message) else value


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds as attributes: branches of an If, bodies of a Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a model: in graphs, bodies, functions, attributes and training_info."""
    return (m for m in messages_in(proto) if isinstance(m, onnx.TensorProto))


def tensor_nbytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes that a tensor's elements take; None for strings and for types unknown to onnx-ir."""
    try:
        kind = ir.DataType(tensor.data_type)
        bits = int(kind.bitwidth)
    except (ValueError, TypeError):
        return None
    return -(-math.prod(int(d) for d in tensor.dims) * bits // 8)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """A model as a protocol buffer that holds what the file held, no more and no less.

    onnx-ir adds descriptions of initializers to ``value_info``, which are removed here, and has no
    place for ``training_info`` and for maps, which are put back.
    """
    proto = ir.to_proto(model)
    proto.training_info.extend(model.graph.meta.get(TRAINING_INFO, ()))
    others = {
        v.name: v.meta[OTHER_TYPE]
        for v in (*model.graph.inputs, *model.graph.outputs)
        if OTHER_TYPE in v.meta
    }
    for info in (*proto.graph.input, *proto.graph.output):
        if info.name in others:
            info.type.CopyFrom(others[info.name])
    for tensor in all_tensors(proto):  # onnx-ir writes what describes an initializer twice
        if len(tensor.metadata_props) > 1:
            entries = {entry.key: entry.value for entry in tensor.metadata_props}
            del tensor.metadata_props[:]
            for key, value in entries.items():
                tensor.metadata_props.add(key=key, value=value)
    initializers = {t.name for t in proto.graph.initializer}
    value_info = [v for v in proto.graph.value_info if v.name not in initializers]
    if len(value_info) != len(proto.graph.value_info):
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(value_info)
    return proto


def serialize(proto: onnx.ModelProto, label: str) -> bytes:
    """A model as bytes, the same for the same model.

    Raises
    ------
    ModelError
        If it is past protobuf's 2 GB.
    """
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (ValueError, EncodeError):
        raise ModelError(
            f"{label} is past protobuf's 2 GB: save it with its weights as external data"
        ) from None
