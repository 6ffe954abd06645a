"""Folding sizes: integers that a model computes although they are the same for all of its inputs.

Exporters that trace, with axes of open size, read the size of every axis when the model runs, fixed
ones too, and compute bounds of slices, parts and paddings from it. Stored as constants they say
which part of a weight, or of the channels, is meant.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.model.attributes import int_attr
from onnxlr.model.constants import constant
from onnxlr.model.folding import ConstantChain, FoldingError
from onnxlr.model.graph import Names, add_initializer, is_standard, opset, remove_unused
from onnxlr.prepare.fold_weights import FixedNodes
from onnxlr.prepare.shapes import Sizes, declared_sizes

KnownSizes = Mapping[str, NDArray[np.int64]]

_SMALL = 1024  # elements of a constant, up to which it may be one that sizes are computed from
_ROUNDS = 4  # one size may tell others, which are looked for so often


def find_sizes(model: ir.Model) -> KnownSizes:
    """The values of the main graph that are computed, integers, and always the same, by name.

    The model stays as it is.
    """
    sketch, found = model.clone(), dict[str, NDArray[np.int64]]()
    for _ in range(_ROUNDS):
        read = _read_off(sketch)
        store_sizes(sketch, read)
        computed = _computed(sketch)
        store_sizes(sketch, computed)
        found |= read | computed
        if not read:
            break
    return found


def store_sizes(model: ir.Model, sizes: KnownSizes) -> None:
    """Store these values in the model, and remove what nobody needs to compute them any more."""
    names, replaced = Names(model), []
    for node in list(model.graph):
        for value in node.outputs:
            if (array := sizes.get(value.name or "")) is None:
                continue
            stored = add_initializer(model.graph, names.unused(f"{value.name}/size"), array)
            value.replace_all_uses_with(stored)
            replaced.append(value)
    remove_unused(replaced)


def _read_off(model: ir.Model) -> dict[str, NDArray[np.int64]]:
    """What Shape nodes give, or others take of that, where it doesn't depend on the inputs."""
    nodes = [node for node in model.graph if is_standard(node, "Shape") and node.inputs[0]]
    found: dict[str, NDArray[np.int64]] = {}
    if not nodes:
        return found
    sizes = declared_sizes(model)
    for node in nodes:
        source = node.inputs[0]
        shape = None if source is None else sizes.get(source.name or "")
        if shape is None:
            continue
        end = int_attr(node, "end", len(shape))
        for value, taken in _taken(node.outputs[0], shape[int_attr(node, "start", 0) : end]):
            known = [size for size in taken.ravel() if size is not None]
            if len(known) == taken.size and value.name:
                found[value.name] = np.array(known, np.int64).reshape(taken.shape)
    return found


def _taken(value: ir.Value, shape: Sizes) -> Iterator[tuple[ir.Value, NDArray[np.object_]]]:
    """A shape that a value holds, and what Gather and Slice take of it."""
    sizes = np.array(shape, dtype=object)
    yield value, sizes
    for node, slot in value.uses():
        if slot or len(node.outputs) != 1:
            continue
        if is_standard(node, "Gather") and int_attr(node, "axis", 0) == 0:
            index = _integers(node.inputs[1])
            if index is not None and np.all((-len(sizes) <= index) & (index < len(sizes))):
                yield node.outputs[0], np.asarray(sizes[index], dtype=object)
        elif is_standard(node, "Slice") and 3 <= len(node.inputs) <= 5:
            start, end = (_number(v) for v in node.inputs[1:3])
            step = _number(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else 1
            if start is not None and end is not None and step == 1:
                yield node.outputs[0], sizes[start:end]


def _number(value: ir.Value | None) -> int | None:
    numbers = _integers(value)
    return int(numbers.item()) if numbers is not None and numbers.size == 1 else None


def _integers(value: ir.Value | None) -> NDArray[np.int64] | None:
    """A constant of integers that no caller may replace; None for anything else."""
    tensor = None if value is None or value.is_graph_input() else constant(value)
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return np.asarray(tensor.numpy()).astype(np.int64)


def _computed(model: ir.Model) -> dict[str, NDArray[np.int64]]:
    """What is computed from small constants alone and read by something that isn't."""
    fixed, version = FixedNodes(model), opset(model)
    small: set[ir.Node] = set()
    for node in fixed.nodes:
        if node.graph is model.graph and all(
            v is None or v.producer() in small or _is_small(v) for v in node.inputs
        ):
            small.add(node)
    found: dict[str, NDArray[np.int64]] = {}
    for node in (n for n in fixed.nodes if n in small):
        for value in node.outputs:
            if all(user in small for user, _ in value.uses()):
                continue
            try:
                array = ConstantChain(value, version).evaluate()
            except FoldingError:
                continue
            if array.dtype == np.int64 and array.size <= _SMALL and value.name:
                found[value.name] = array.astype(np.int64)
    return found


def _is_small(value: ir.Value) -> bool:
    tensor = constant(value)
    return tensor is not None and tensor.size <= _SMALL
