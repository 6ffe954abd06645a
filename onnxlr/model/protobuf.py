"""Walks over a model's protocol buffers."""

import math
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def messages_in(*begin: Message) -> Iterator[Any]:
    """These messages and all within, but for what tensors hold."""
    waiting = list(begin)
    while waiting:
        message = waiting.pop()
        yield message
        if isinstance(message, onnx.TensorProto):
            continue
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                waiting += (value,) if isinstance(value, Message) else value


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds as attributes: branches of an If, bodies of a Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


PROTOBUF_LIMIT = 2**31 - 1


def tensor_nbytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes that a tensor's elements take; None for strings and types unknown here."""
    try:
        kind = ir.DataType(tensor.data_type)
        bits = int(kind.bitwidth)
    except (ValueError, TypeError):
        return None
    return -(-math.prod(int(d) for d in tensor.dims) * bits // 8)


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Wherever they are: in graphs, bodies, functions, attributes and training."""
    return (m for m in messages_in(proto) if isinstance(m, onnx.TensorProto))
