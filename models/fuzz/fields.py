"""Changing any field of any message of a model, whatever it means."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor

from models.fuzz.basics import FLOATS, NUMBERS, Rng, pick

_WORDS = (
    *("", "x", "y", "w", "w1", "fc", "nowhere", "ai.onnx", "local", "com.microsoft", "../x", "\0"),
    *("a" * 100_000, "w1/svd_0", "w/svd_1", "y/svd_0", "fc1/svd_0", "é\n\x1b[31m", "{0!r}", "%s"),
)


def _messages(message: Any) -> Iterator[Any]:
    """Yield a message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in value if field.is_repeated else (value,):
                yield from _messages(item)


def _other(field: FieldDescriptor, rng: Rng) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        word = pick(rng, _WORDS)
        return word.encode() if field.type == FieldDescriptor.TYPE_BYTES else word
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return pick(rng, FLOATS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return pick(rng, field.enum_type.values).number
    if kind == FieldDescriptor.CPPTYPE_INT32:
        return struct.unpack("<i", struct.pack("<q", pick(rng, NUMBERS))[:4])[0]
    if kind == FieldDescriptor.CPPTYPE_UINT64:
        return pick(rng, NUMBERS) % 2**64
    return pick(rng, NUMBERS)


def scramble(model: onnx.ModelProto, rng: Rng) -> None:
    """Change a few fields of any messages: drop, double, exchange, overwrite, move."""
    for _ in range(int(rng.integers(1, 4))):
        message = pick(rng, list(_messages(model)))
        fields = [f for f, _ in message.ListFields()]
        if not fields or rng.random() < 0.1:
            fields = list(message.DESCRIPTOR.fields)
        field = pick(rng, fields)
        _scramble_field(message, field, rng, model)


def _scramble_field(message: Any, field: FieldDescriptor, rng: Rng, model: onnx.ModelProto) -> None:
    value = getattr(message, field.name)
    if field.is_repeated:
        change = int(rng.integers(4)) if len(value) else 4
        index = int(rng.integers(len(value))) if len(value) else 0
        if change == 0:
            del value[index]
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            messages = [type(v).FromString(v.SerializeToString()) for v in value]
            others = [m for m in _messages(model) if m.DESCRIPTOR.name == field.message_type.name]
            if others:
                messages.insert(index, pick(rng, others))
            if change == 1:
                rng.shuffle(messages)
            copies = [type(v).FromString(v.SerializeToString()) for v in messages]
            del value[:]
            value.extend(copies)
        elif change == 1:
            value.insert(index, _other(field, rng))
        elif len(value):
            value[index] = pick(rng, value) if change == 2 else _other(field, rng)
    elif rng.random() < 0.3:
        message.ClearField(field.name)
    elif field.type != FieldDescriptor.TYPE_MESSAGE:
        setattr(message, field.name, _other(field, rng))
    else:
        others = [m for m in _messages(model) if m.DESCRIPTOR.name == field.message_type.name]
        if others:
            copied = pick(rng, others).SerializeToString()
            value.Clear()
            value.ParseFromString(copied)
