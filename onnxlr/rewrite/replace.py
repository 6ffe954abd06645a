"""Writing chains into a graph in place of the layers that a plan names."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.find import find_layers
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.cost import common_factor
from onnxlr.methods.writer import AttributeValue, Write
from onnxlr.model.constants import constant
from onnxlr.model.graph import (
    DEFAULT_VALUES_IR,
    ArrayFile,
    Names,
    add_initializer,
    copy_metadata,
    opset,
    remove_unused,
)
from onnxlr.rewrite.common import Common
from onnxlr.rewrite.shifts import (
    bias_behind,
    fixed_bias,
    shift_behind,
    shift_bias,
    shift_inside,
    shifted,
)
from onnxlr.types import Shapes, rank_text

_NODE_METADATA_IR = 10  # since this version of the format, nodes have metadata
_STEM = 48  # characters of a name that others begin with: long ones would take more than is saved
_OURS = "onnxlr_"  # before the names of those that say how a node was made


def rewrite(
    model: ir.Model,
    shapes: Shapes,
    choices: Mapping[str, Choice],
    factors: Mapping[str, Factored],
) -> ir.Model:
    """A copy of a prepared model with the chosen layers replaced; all other weights are shared.

    Parameters
    ----------
    model : onnx_ir.Model
    shapes : mapping of str to tuple of int
    choices : mapping of str to Choice
        By layer name.
    factors : mapping of str to Factored
        What is stored for each of those layers.
    """
    result = model.clone()
    names, common = Names(result), Common()
    for layer in find_layers(result, shapes):
        choice = choices.get(layer.name)
        if choice is not None:
            replace_layer(result, layer, choice, factors[layer.name], names, common)
    if choices and result.ir_version < DEFAULT_VALUES_IR:
        # Before IR 4 every initializer had to be an input of the graph as well; factors are not.
        result.ir_version = DEFAULT_VALUES_IR
    return result


def replace_layer(
    model: ir.Model,
    layer: Layer,
    choice: Choice,
    factored: Factored,
    names: Names,
    common: Common | None = None,
) -> None:
    """Replace every user of a layer by the chosen chain, in place.

    Each factor is stored once, as the weight was, and cast where the weight was cast. Factors are
    initializers of the main graph, which every body sees.

    Parameters
    ----------
    common : Common, optional
        What its siblings have left in the model, for a method that shares.
    """
    shared = (common or Common()) if choice.graph_pass.shares else None
    site = _GraphSite(model, layer, choice, factored, names, shared)
    choice.graph_pass.install(layer, choice.rank, site)


class _GraphSite:
    """A layer's place in a graph, with its factors stored there (the ``Site`` of a pass)."""

    def __init__(
        self,
        model: ir.Model,
        layer: Layer,
        choice: Choice,
        factored: Factored,
        names: Names,
        common: Common | None,
    ) -> None:
        method = choice.graph_pass.name.replace("-", "_")
        self._model, self._layer, self._method, self._names = model, layer, method, names
        self._choice, self._shift, self._common = choice, factored.shift, common
        self._stored = tuple(self._store(i, factor) for i, factor in enumerate(factored.stored))
        tensor = constant(layer.weight)
        assert tensor is not None
        for factor in self._stored:
            copy_metadata(layer.weight, factor)
            copy_metadata(tensor, factor.const_value)

    def _store(self, i: int, factor: NDArray[np.generic] | ArrayFile) -> ir.Value:
        layer = self._layer

        def add() -> ir.Value:
            name = f"{(layer.weight.name or layer.name)[:_STEM]}/{self._method}_{i}"
            graph = self._model.graph
            return add_initializer(graph, self._names.unused(name), factor, layer.dtype)

        if self._common is not None and i == common_factor(self._choice.graph_pass, layer):
            return self._common.factor(factor, add)
        return add()

    def replace_use(self, use: Use, write: Write) -> None:
        """Put a chain in the place of a user, with a bias that makes up for the mean's loss."""
        model, node, shift = self._model, use.node, self._shift
        graph = _graph_of(use, model)
        writer = _GraphWriter(model, graph, node, self._method, self._names, self._common)
        stale = [v for v in node.inputs if v is not None]
        if shift is not None and node.op_type != "MatMul":
            shift_bias(use, shift, writer, fixed_bias(use, model))
        wider = use.dtype != self._layer.dtype
        factors = tuple(_cast(f, use.dtype, writer) if wider else f for f in self._stored)
        output = write(factors, writer)
        if shift is not None and node.op_type == "MatMul":
            if (bias := bias_behind(use, shift.size, model)) is not None:
                stale += shift_behind(bias, shift, writer, use.dtype)
            else:
                output = shifted(use, shift, self._layer.shape[:-2], output, writer)
        copy_metadata(node.outputs[0], output)
        self._describe(writer.nodes, node)
        if writer.graph is not model.graph and use.y_axes is not None:
            # Runtimes want to know of bodies how many axes they give. Before opset 13 they don't
            # find out behind a Reshape to sizes that are read.
            output.type, output.shape = ir.TensorType(use.dtype), ir.Shape([None] * use.y_axes)
        ir.convenience.replace_nodes_and_values(
            writer.graph, node, [node], writer.nodes, [node.outputs[0]], [output]
        )
        remove_unused(stale)

    def replace_input(self, use: Use, write: Write) -> None:
        """Put what is written in front of a user, and the last factor in its weight's place."""
        model, node = self._model, use.node
        graph = _graph_of(use, model)
        writer = _GraphWriter(model, graph, node, self._method, self._names, self._common)
        stale = [v for v in (node.inputs[use.slot],) if v is not None]
        wider = use.dtype != self._layer.dtype
        factors = tuple(_cast(f, use.dtype, writer) if wider else f for f in self._stored)
        hidden = write(factors, writer)
        if self._shift is not None:
            stale += shift_inside(self._layer, use, self._shift, writer, model)
        node.replace_input_with(node.inputs.index(use.x), hidden)
        node.replace_input_with(use.slot, factors[-1])
        self._describe([*writer.nodes, node], node)
        graph.insert_before(node, writer.nodes)
        remove_unused(stale)

    def _describe(self, chain: Sequence[ir.Node], node: ir.Node) -> None:
        """Have the nodes of a chain say what the replaced one said, and what they are."""
        made = {}
        if self._model.ir_version >= _NODE_METADATA_IR:
            first = node.metadata_props.get(f"{_OURS}replaces", node.name or node.outputs[0].name)
            made = {
                f"{_OURS}method": self._choice.graph_pass.name,
                f"{_OURS}rank": rank_text(self._choice.rank),
                f"{_OURS}replaces": first or "",
            }
        for written in chain:
            written.doc_string = node.doc_string
            written.metadata_props.update({**node.metadata_props, **made})

    def replace_weight(self, write: Write) -> None:
        """Put what multiplies the factors at the head of the main graph, in the weight's place."""
        model, layer, weight = self._model, self._layer, self._layer.weight
        writer = _GraphWriter(model, model.graph, weight, self._method, self._names)
        # Half precision has no product on CPUs that a runtime could fold: float32 has everywhere.
        narrow = layer.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        single = {"to": int(ir.DataType.FLOAT)}
        factors = tuple(writer.op("Cast", [f], single) if narrow else f for f in self._stored)
        whole = write(factors, writer)
        if narrow:
            whole = writer.op("Cast", [whole], {"to": int(layer.dtype)})
        whole.type, whole.shape = ir.TensorType(layer.dtype), ir.Shape(layer.stored_shape)
        model.graph.insert_before(model.graph[0], writer.nodes)
        weight.replace_all_uses_with(whole)
        remove_unused([weight])


def _cast(factor: ir.Value, dtype: ir.DataType, writer: "_GraphWriter") -> ir.Value:
    """A factor in another type; passes ask for its shape."""
    output = writer.op("Cast", [factor], {"to": int(dtype)})
    output.type, output.shape = ir.TensorType(dtype), factor.shape
    return output


def _graph_of(use: Use, model: ir.Model) -> ir.Graph:
    """The graph that a node is in: the main one, or the body of an If, Loop or Scan."""
    return use.node.graph if isinstance(use.node.graph, ir.Graph) else model.graph


class _GraphWriter:
    """Names and collects the nodes of one chain (the ``Writer`` of a pass)."""

    def __init__(
        self,
        model: ir.Model,
        graph: ir.Graph,
        origin: ir.Node | ir.Value,
        method: str,
        names: Names,
        common: Common | None = None,
    ) -> None:
        self.opset = opset(model)
        self.nodes: list[ir.Node] = []
        self.graph = graph
        self._names, self._common = names, common
        value = origin.outputs[0] if isinstance(origin, ir.Node) else origin
        self._node_stem = f"{(origin.name or value.name or '')[:_STEM]}/{method}"
        self._value_stem = f"{(value.name or '')[:_STEM]}/{method}"

    def op(
        self, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, AttributeValue]
    ) -> ir.Value:
        """Add a node; the last one written takes over the original's output name."""
        if self._common is None:
            return self._add(op_type, inputs, attributes)
        write = partial(self._add, op_type, inputs, attributes)
        return self._common.node(self.graph, op_type, inputs, attributes, write)

    def _add(
        self, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, AttributeValue]
    ) -> ir.Value:
        i = len(self.nodes)
        node = ir.node(
            op_type, inputs, attributes, name=self._names.unused(f"{self._node_stem}_{i}")
        )
        node.outputs[0].name = self._names.unused(f"{self._value_stem}_{i}")
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        """Add a small constant that is no factor."""
        name = self._names.unused(f"{self._value_stem}_constant")
        return add_initializer(self.graph, name, array, dtype)
