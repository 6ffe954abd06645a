"""Writing chains into a graph in place of the layers that a plan names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.graph_pass import AttributeValue, ChainPass, GraphPass, Rank, WeightPass
from onnxlr.layers import Layer, Shapes, Use, find_layers
from onnxlr.model import Names, add_initializer, carry_over, opset, remove_unused

Factors = tuple[NDArray[np.generic], ...]
Factorize = Callable[[Layer, GraphPass, Rank], Factors]


@dataclass(frozen=True)
class Choice:
    """What replaces a layer: the pass and its rank."""

    graph_pass: GraphPass
    rank: Rank


def rewrite(
    model: ir.Model, shapes: Shapes, choices: Mapping[str, Choice], factorize: Factorize
) -> ir.Model:
    """A copy of a prepared model with the chosen layers replaced; the weights kept are shared.

    Parameters
    ----------
    model : onnx_ir.Model
    shapes : mapping of str to tuple of int
    choices : mapping of str to Choice
        By layer name.
    factorize : callable
        ``(layer, graph_pass, rank) -> factors``, which may look them up.
    """
    result = model.clone()
    names = Names(result)
    for layer in find_layers(result, shapes):
        choice = choices.get(layer.name)
        if choice is not None:
            factors = factorize(layer, choice.graph_pass, choice.rank)
            replace_layer(result, layer, choice, factors, names)
    if choices and result.ir_version < 4:
        # Before IR 4 every initializer had to be an input of the graph as well; factors are not.
        result.ir_version = 4
    return result


def replace_layer(
    model: ir.Model, layer: Layer, choice: Choice, factors: Factors, names: Names
) -> None:
    """Replace every user of a layer by the chosen chain, in place.

    Each factor is stored once, as the weight was, and cast where the weight was cast. Factors are
    initializers of the main graph, which every body sees.
    """
    method = choice.graph_pass.name.replace("-", "_")
    stem = layer.weight.name or layer.name
    stored = [
        add_initializer(model.graph, names.unused(f"{stem}/{method}_{i}"), factor, layer.dtype)
        for i, factor in enumerate(factors)
    ]
    if isinstance(choice.graph_pass, WeightPass):
        _restore_weight(model, layer, choice.graph_pass, choice.rank, stored, names)
        return
    assert isinstance(choice.graph_pass, ChainPass)
    for use in layer.uses:
        writer = _GraphWriter(model, _graph_of(use, model), use.node, method, names)
        cast = tuple(
            writer.op("Cast", [f], {"to": int(use.dtype)}) if use.dtype != layer.dtype else f
            for f in stored
        )
        output = choice.graph_pass.write(layer, use, choice.rank, cast, writer)
        node = use.node
        carry_over(node.outputs[0], output)
        stale = [v for v in node.inputs if v is not None]
        ir.convenience.replace_nodes_and_values(
            writer.graph, node, [node], writer.nodes, [node.outputs[0]], [output]
        )
        remove_unused(stale)


def _restore_weight(
    model: ir.Model,
    layer: Layer,
    graph_pass: WeightPass,
    rank: Rank,
    stored: list[ir.Value],
    names: Names,
) -> None:
    """Put what multiplies the factors at the head of the main graph, in the weight's place."""
    weight, method = layer.weight, graph_pass.name.replace("-", "_")
    writer = _GraphWriter(model, model.graph, weight, method, names)
    # Half precision has no product on CPUs that a runtime could fold: float32 has everywhere.
    narrow = layer.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    single = {"to": int(ir.DataType.FLOAT)}
    factors = tuple(writer.op("Cast", [f], single) if narrow else f for f in stored)
    whole = graph_pass.restore(layer, rank, factors, writer)
    if narrow:
        whole = writer.op("Cast", [whole], {"to": int(layer.dtype)})
    whole.type, whole.shape = ir.TensorType(layer.dtype), ir.Shape(layer.stored_shape)
    model.graph.insert_before(model.graph[0], writer.nodes)
    weight.replace_all_uses_with(whole)
    remove_unused([weight])


def _graph_of(use: Use, model: ir.Model) -> ir.Graph:
    """The node's own graph: the main one, or the body of an If, Loop or Scan."""
    return use.node.graph if isinstance(use.node.graph, ir.Graph) else model.graph


class _GraphWriter:
    """Names and collects the nodes of one chain (the ``Writer`` that a pass is given)."""

    def __init__(
        self,
        model: ir.Model,
        graph: ir.Graph,
        origin: ir.Node | ir.Value,
        method: str,
        names: Names,
    ) -> None:
        self.opset = opset(model)
        self.nodes: list[ir.Node] = []
        self.graph = graph
        self._names = names
        value = origin.outputs[0] if isinstance(origin, ir.Node) else origin
        self._node_stem = f"{origin.name or value.name}/{method}"
        self._value_stem = f"{value.name}/{method}"

    def op(
        self, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, AttributeValue]
    ) -> ir.Value:
        """Add a node; the last one written takes over the original's output name."""
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
