"""What every convolution pass needs: the kernel's axes and the attributes of the written convs."""

import math
from collections.abc import Callable, Mapping

from onnxlr.graph_pass import AttributeValue
from onnxlr.layers import Layer, Use
from onnxlr.model import ints_attr, str_attr


def kernel_axes(layer: Layer) -> tuple[int, int, int, tuple[int, ...]]:
    """Groups, outputs per group, inputs per group and the spatial shape of a Conv's kernel."""
    group = layer.group
    return group, layer.shape[0] // group, layer.shape[1], layer.shape[2:]


def sliding_attributes(layer: Layer, use: Use, group: int) -> dict[str, AttributeValue]:
    """Attributes of the conv that slides as the original does: same strides, pads, dilations."""
    node, spatial = use.node, layer.shape[2:]
    ones = (1,) * len(spatial)
    attributes: dict[str, AttributeValue] = {
        "kernel_shape": spatial,
        "strides": ints_attr(node, "strides", ones),
        "dilations": ints_attr(node, "dilations", ones),
        "group": group,
    }
    auto_pad = str_attr(node, "auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        attributes["pads"] = ints_attr(node, "pads", (0,) * (2 * len(spatial)))
    else:
        attributes["auto_pad"] = auto_pad
    return attributes


def pointwise_attributes(layer: Layer, group: int) -> Mapping[str, AttributeValue]:
    """Attributes of a 1×…×1 conv that touches every position once."""
    return {"kernel_shape": (1,) * (len(layer.shape) - 2), "group": group}


def sum_macs(layer: Layer, per_use: Callable[[int, int], int]) -> int | None:
    """Sum ``per_use(input positions, output positions)`` over the users; None if one is unknown.

    Positions count the batch and all spatial places, not the channels.
    """
    total = 0
    for use in layer.uses:
        if use.x_shape is None or use.y_shape is None:
            return None
        before = use.x_shape[0] * math.prod(use.x_shape[2:])
        after = use.y_shape[0] * math.prod(use.y_shape[2:])
        total += per_use(before, after)
    return total
