"""Attributes of nodes, with the default where one is absent or belongs to a function's caller."""

import onnx_ir as ir


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
    """The ``auto_pad`` of a convolution; an empty string means NOTSET, as in ONNX Runtime."""
    return str_attr(node, "auto_pad", "") or "NOTSET"
