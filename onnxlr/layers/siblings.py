"""Siblings: layers that multiply one input in the same way, as projections to Q, K and V do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxlr.layers.kernel import as_matrix, matrix_sides, output_count
from onnxlr.layers.layer import Layer
from onnxlr.model.attributes import int_attr
from onnxlr.types import Array

# Attributes of a Conv that say where its kernel lies on the input.
_PLACING = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


def with_siblings(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The same layers, each with those that read its input in the same way."""
    families: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        if (key := _reading(layer)) is not None:
            families.setdefault(key, []).append(layer)
    siblings = {
        layer.name: tuple(family)
        for family in families.values()
        if len(family) > 1
        for layer in family
    }
    return tuple(replace(layer, siblings=siblings.get(layer.name, ())) for layer in layers)


def _reading(layer: Layer) -> tuple[object, ...] | None:
    """What a layer multiplies, and how; None where its weight can't be stacked upon others."""
    if layer.refusal is not None or len(layer.uses) != 1:
        return None
    (use,) = layer.uses
    head = (id(use.x), id(use.node.graph), use.node.op_type, use.slot, layer.dtype, use.dtype)
    if layer.kind == "matrix" and len(layer.shape) == 2:
        data = int_attr(use.node, "transB" if use.slot == 0 else "transA", 0)
        return *head, data, use.contracts_last, layer.shape[-1 if use.contracts_last else -2]
    if layer.kind == "conv" and layer.group == 1:
        attributes = use.node.attributes
        named = [name for name in _PLACING if name in attributes]
        placing = tuple((name, _plain(attributes[name].value)) for name in named)
        return *head, placing, layer.shape[1:]
    return None


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, eq=False)
class Stack:
    """The weights of siblings upon each other.

    Attributes
    ----------
    matrix : ndarray of shape (outputs of all, inputs)
        Each weight divided by its size.
    rows : slice
        Those of one layer.
    size : float
        Of that layer's weight.
    """

    matrix: Array
    rows: slice
    size: float


def stack_of(layer: Layer, size: Callable[[Array], float]) -> Stack:
    """The stack of a layer and its siblings.

    Parameters
    ----------
    layer : Layer
        With siblings.
    size : callable
        Gives the size of a weight as outputs × inputs; weights of none are taken as they are.
    """
    weights = [as_matrix(sibling, sibling.array())[0] for sibling in layer.siblings]
    sizes = [size(weight) or 1.0 for weight in weights]
    matrix = np.concatenate([w / scale for w, scale in zip(weights, sizes, strict=True)])
    at = [sibling.name for sibling in layer.siblings].index(layer.name)
    first = sum(map(output_count, layer.siblings[:at]))
    return Stack(matrix, slice(first, first + len(weights[at])), sizes[at])


def stack_shape(layer: Layer) -> tuple[int, int]:
    """Outputs of all siblings, and inputs."""
    return sum(map(output_count, layer.siblings)), matrix_sides(layer)[2]


def share_of(layer: Layer) -> float:
    """The layer's part of the outputs of all its siblings."""
    return output_count(layer) / stack_shape(layer)[0]
