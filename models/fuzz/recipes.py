"""Ways to break a sound ONNX model on purpose, each by what it does to the graph.

Every function changes a model in place, by the choices of a seeded generator. ``RECIPES`` are aimed
at what readers of models get wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper

from models.fuzz.basics import FLOATS, NUMBERS, Recipe, Rng, any_weight, graphs, pick
from models.fuzz.sizes import endless, explosion, gigantic, many, nested
from models.fuzz.weights import empty_weight, odd_dims, odd_values, other_fields, other_type

_OPERATORS = (
    *("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "LSTM", "Loop", "If", "Scan", "Range"),
    *("Expand", "Tile", "Pad", "Resize", "ConstantOfShape", "Reshape", "Identity", "Transpose"),
    *("Cast", "NonZero", "Einsum", "SequenceAt", "Optional", "Constant", "OneHot", "Bogus"),
)


def _node(model: onnx.ModelProto, rng: Rng, *ops: str) -> NodeProto:
    nodes = [n for g in graphs(model) for n in g.node if not ops or n.op_type in ops]
    nodes = nodes or [n for g in graphs(model) for n in g.node] or [model.graph.node.add()]
    node: NodeProto = pick(rng, nodes)
    return node


def _names(model: onnx.ModelProto) -> list[str]:
    names = {n for g in graphs(model) for node in g.node for n in (*node.input, *node.output)}
    return sorted(names | {t.name for g in graphs(model) for t in g.initializer})


def _attribute(node: NodeProto, name: str, value: Any) -> None:
    others = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*others, helper.make_attribute(name, value)])


def cycle(model: onnx.ModelProto, rng: Rng) -> None:
    """A node reads what depends on it."""
    node = _node(model, rng)
    if node.input:
        node.input[0] = pick(rng, [n for m in model.graph.node for n in m.output] or [""])


def dangling(model: onnx.ModelProto, rng: Rng) -> None:
    """A node reads a name that nothing produces, or no name at all."""
    node = _node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = pick(rng, ("nowhere", "", "\0"))


def same_name(model: onnx.ModelProto, rng: Rng) -> None:
    """Two values, or a value and a weight, or a value in a body and one outside share a name."""
    node = _node(model, rng)
    if node.output:
        node.output[0] = pick(rng, _names(model))


def shadowed(model: onnx.ModelProto, rng: Rng) -> None:
    """A body declares a weight or an input by the name of something outside."""
    graph = pick(rng, graphs(model))
    name = pick(rng, _names(model))
    if rng.random() < 0.5:
        graph.initializer.add().CopyFrom(any_weight(model, rng))
        graph.initializer[-1].name = name
    else:
        graph.input.append(helper.make_tensor_value_info(name, 1, [4, 24]))


def taken_names(model: onnx.ModelProto, rng: Rng) -> None:
    """Values and nodes have the names that replacements would get."""
    stems = [t.name for t in model.graph.initializer] + [n.name for n in model.graph.node]
    stems += [o for n in model.graph.node for o in n.output]
    for stem in stems:
        for end in ("svd_0", "svd_1", "svd_constant", "channel_svd_0", "expand_at_load_0"):
            extra = f"{stem}/{end}"
            source = pick(rng, [*(i.name for i in model.graph.input)])
            if source:
                model.graph.node.append(helper.make_node("Identity", [source], [extra], name=extra))


def binary_name(model: onnx.ModelProto, rng: Rng) -> None:
    """A name that becomes other than UTF-8: marked here, and exchanged in the bytes."""
    old = pick(rng, [n for n in _names(model) if n] or ["x"])
    for graph in graphs(model):
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["\x01\x02\x03" if n == old else n for n in names]
        for named in (*graph.initializer, *graph.input, *graph.output):
            if named.name == old:
                named.name = "\x01\x02\x03"


def long_name(model: onnx.ModelProto, rng: Rng) -> None:
    """A name of a million letters."""
    old, new = pick(rng, _names(model) or ["x"]), "n" * 1_000_000
    for node in model.graph.node:
        node.input[:] = [new if n == old else n for n in node.input]
        node.output[:] = [new if n == old else n for n in node.output]
        node.name = node.name if rng.random() < 0.8 else new
    for named in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        named.name = new if named.name == old else named.name


def twice(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight, an input, an output or a node is there twice."""
    graph = pick(rng, graphs(model))
    listed = pick(rng, (graph.initializer, graph.input, graph.output, graph.node))
    if listed:
        listed.add().CopyFrom(pick(rng, listed))


def weight_is_output(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight is an output, alone or too."""
    tensor = any_weight(model, rng)
    info = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
    if rng.random() < 0.5:
        del model.graph.output[:]
    model.graph.output.append(info)


def huge_declared(model: onnx.ModelProto, rng: Rng) -> None:
    """Inputs, outputs or intermediate values declare sizes beyond any memory."""
    infos = [*model.graph.input, *model.graph.output]
    info = pick(rng, infos)
    if info is None:
        return
    shape = info.type.tensor_type.shape
    for _ in range(int(rng.integers(3)) if shape.dim else 0):
        shape.dim[int(rng.integers(len(shape.dim)))].dim_value = pick(rng, NUMBERS)
    if rng.random() < 0.3:
        dims = [pick(rng, (2**20, 2**31, 2**40, 10**5)) for _ in range(int(rng.integers(1, 5)))]
        value = pick(rng, _names(model) or ["x"])
        model.graph.value_info.append(helper.make_tensor_value_info(value, 1, dims))
    if rng.random() < 0.2:
        del shape.dim[:]


def huge_numbers(model: onnx.ModelProto, rng: Rng) -> None:
    """Integer weights (shapes, pads, trip counts) and scales are made absurd."""
    small = [
        t
        for g in graphs(model)
        for t in g.initializer
        if t.data_type in (TensorProto.INT64, TensorProto.FLOAT) and int(np.prod(t.dims)) <= 8
    ]
    tensor = pick(rng, small)
    if tensor is None or not tensor.raw_data:
        return
    kind = np.int64 if tensor.data_type == TensorProto.INT64 else np.float32
    values = np.frombuffer(tensor.raw_data, kind).copy()
    for _ in range(int(rng.integers(1, 3)) if len(values) else 0):
        options = NUMBERS if kind is np.int64 else (*FLOATS, 1e4, 1e9)
        values[int(rng.integers(len(values)))] = pick(rng, options)
    tensor.raw_data = values.tobytes()


def odd_attribute(model: onnx.ModelProto, rng: Rng) -> None:
    """Strides of 0, negative pads, groups that don't divide, axes out of range, and so on."""
    node = _node(model, rng, "Conv", "ConvTranspose", "MaxPool", "Gemm", "Gather", "LSTM")
    name = pick(
        rng,
        (
            *("strides", "pads", "dilations", "group", "axis", "kernel_shape", "output_padding"),
            *("output_shape", "transA", "alpha", "hidden_size", "auto_pad", "perm", "to"),
        ),
    )
    value: Any = pick(rng, NUMBERS)
    if name in ("strides", "pads", "dilations", "kernel_shape", "output_padding", "output_shape"):
        value = [pick(rng, NUMBERS) for _ in range(int(rng.integers(0, 5)))]
    elif name == "auto_pad":
        value = pick(rng, ("SAME_UPPER", "VALID", "NONSENSE", ""))
    elif name == "alpha":
        value = pick(rng, FLOATS)
    elif name == "perm":
        value = pick(rng, ([0, 0], [5, 1], [-1, 0], [0], [1, 0, 2]))
    if isinstance(value, list) and not value:
        attr = node.attribute.add(name=name, type=AttributeProto.INTS)
        attr.name = name
        return
    _attribute(node, name, value)


def any_attribute(model: onnx.ModelProto, rng: Rng) -> None:
    """An attribute is missing, doubled, of another type, or a reference."""
    node = _node(model, rng)
    attribute = pick(rng, node.attribute)
    if attribute is None:
        return
    change = int(rng.integers(5))
    if change == 0:
        node.attribute.remove(attribute)
    elif change == 1:
        node.attribute.add().CopyFrom(attribute)
    elif change == 2:
        attribute.type = int(rng.integers(0, 15))
    elif change == 3:
        attribute.ref_attr_name = "outer"
    else:
        value = pick(rng, ("text", 3, 2.5, [1, 2], [0.5], ["a"], [2**62] * 3))
        _attribute(node, attribute.name, value)


def lies(model: onnx.ModelProto, rng: Rng) -> None:
    """Opset, IR version, domains, or an operator's name are other than they should be."""
    change = int(rng.integers(6))
    if change == 0:
        model.opset_import[0].version = pick(rng, (*range(1, 30), 2**31, 2**62, -1))
    elif change == 1:
        model.ir_version = pick(rng, (0, 1, 2, 3, 4, 7, 10, 11, 99, -1, 2**62))
    elif change == 2:
        _node(model, rng).domain = pick(rng, ("ai.onnx", "com.microsoft", "local", "ai.onnx.ml"))
    elif change == 3:
        _node(model, rng).op_type = pick(rng, _OPERATORS)
    elif change == 4:
        model.opset_import.add(domain=pick(rng, ("", "ai.onnx", "x")), version=int(rng.integers(9)))
    else:
        del model.opset_import[:]


def wild_types(model: onnx.ModelProto, rng: Rng) -> None:
    """Inputs and outputs that are sequences, optional, sparse, strings or of no type."""
    info = pick(rng, [*model.graph.input, *model.graph.output])
    if info is None:
        return
    change = int(rng.integers(6))
    original = onnx.TypeProto()
    original.CopyFrom(info.type)
    info.ClearField("type")
    if change == 0:
        info.type.sequence_type.elem_type.CopyFrom(original)
    elif change == 1:
        info.type.optional_type.elem_type.CopyFrom(original)
    elif change == 2:
        info.type.sparse_tensor_type.elem_type = 1
    elif change == 3:
        info.type.map_type.key_type = TensorProto.INT64
        info.type.map_type.value_type.CopyFrom(original)
    elif change == 4:
        info.type.CopyFrom(original)
        info.type.tensor_type.elem_type = int(rng.integers(0, 30))


def little_left(model: onnx.ModelProto, rng: Rng) -> None:
    """No nodes, no outputs, no inputs, no weights, no graph."""
    change = int(rng.integers(6))
    graph = pick(rng, graphs(model))
    if change < 4:
        listed = (graph.node, graph.output, graph.input, graph.initializer)[change]
        del listed[:]
    elif change == 4:
        model.ClearField("graph")
    else:
        model.graph.Clear()


def sparse(model: onnx.ModelProto, rng: Rng) -> None:
    """A sparse weight, as an initializer or in a Constant."""
    values = helper.make_tensor("sparse", 1, [2], [1.0, 2.0])
    places = helper.make_tensor("i", TensorProto.INT64, [2], [pick(rng, NUMBERS), 3])
    weight = helper.make_sparse_tensor(values, places, [24, pick(rng, (16, 0, 2**40))])
    if rng.random() < 0.5:
        model.graph.sparse_initializer.append(weight)
    else:
        node = helper.make_node("Constant", [], ["sparse_value"], sparse_value=weight)
        model.graph.node.insert(0, node)
        _node(model, rng, "MatMul").input[1:2] = ["sparse_value"]


RECIPES: dict[str, Recipe] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (
        *(cycle, dangling, same_name, shadowed, taken_names, binary_name, long_name, twice),
        *(weight_is_output, odd_dims, empty_weight, huge_declared, huge_numbers, odd_attribute),
        *(any_attribute, other_type, odd_values, other_fields, lies, wild_types, little_left),
        *(many, sparse, nested, explosion, endless, gigantic),
    )
}
