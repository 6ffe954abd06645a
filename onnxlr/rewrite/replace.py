"""Writing chains into a graph in place of the layers that a plan names."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.find import find_layers
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.cost import common_factor
from onnxlr.methods.writer import AttributeValue, Write
from onnxlr.model.attributes import float_attr
from onnxlr.model.constants import constant, to_float64
from onnxlr.model.graph import (
    DEFAULT_VALUES_IR,
    ArrayFile,
    Names,
    add_initializer,
    copy_metadata,
    is_standard,
    opset,
    remove_unused,
)
from onnxlr.types import Shape, Shapes, rank_text

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


class Common:
    """What siblings have in common in one model: a factor that is stored once, and its product."""

    def __init__(self) -> None:
        self._factors: list[tuple[NDArray[np.generic], ir.Value]] = []
        self._nodes: dict[tuple[object, ...], ir.Value] = {}

    def factor(
        self, array: NDArray[np.generic] | ArrayFile, store: Callable[[], ir.Value]
    ) -> ir.Value:
        """The value of a factor; stored where no other of the same numbers is."""
        numbers = array.array() if isinstance(array, ArrayFile) else array
        for known, value in self._factors:
            if known.dtype == numbers.dtype and np.array_equal(known, numbers):
                return value
        self._factors.append((numbers, store()))
        return self._factors[-1][1]

    def node(
        self,
        graph: ir.Graph,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, AttributeValue],
        write: Callable[[], ir.Value],
    ) -> ir.Value:
        """The output of a node; written where no equal one is."""
        key = (graph, op_type, *inputs, repr(sorted(attributes.items())))
        if key not in self._nodes:
            self._nodes[key] = write()
        return self._nodes[key]


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
            _shift_bias(use, shift, writer, _fixed_bias(use, model))
        wider = use.dtype != self._layer.dtype
        factors = tuple(_cast(f, use.dtype, writer) if wider else f for f in self._stored)
        output = write(factors, writer)
        if shift is not None and node.op_type == "MatMul":
            if (bias := _bias_behind(use, shift.size, model)) is not None:
                stale += _shift_behind(bias, shift, writer, use.dtype)
            else:
                output = _shifted(use, shift, self._layer.shape[:-2], output, writer)
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


def _shifted(
    use: Use,
    shift: NDArray[np.float64],
    stack: Shape,
    output: ir.Value,
    writer: "_GraphWriter",
) -> ir.Value:
    """What a MatMul gives, with what its mean lost; without, where W may meet a vector."""
    if use.slot == 0 and use.x_axes is None:
        return output
    column: Shape = (-1, 1) if use.slot == 0 and use.x_axes != 1 else (-1,)
    if stack:  # of matrices, each with outputs of its own
        column = (*stack, -1, 1) if use.slot == 0 else (*stack, 1, -1)
    return writer.op("Add", [output, writer.constant(shift.reshape(column), use.dtype)], {})


def _bias_behind(use: Use, outputs: int, model: ir.Model) -> tuple[ir.Node, int] | None:
    """The Add of a constant vector behind a MatMul, and which of its inputs that is."""
    output = use.node.outputs[0]
    readers = output.uses()
    if use.slot == 0 or output.is_graph_output() or len(readers) != 1:
        return None
    ((node, at),) = readers
    other = 1 - at
    if not is_standard(node, "Add") or (tensor := _fixed(node.inputs[other], model)) is None:
        return None
    return (node, other) if tuple(tensor.shape) == (outputs,) else None


def _shift_behind(
    bias: tuple[ir.Node, int],
    shift: NDArray[np.float64],
    writer: "_GraphWriter",
    dtype: ir.DataType,
) -> list[ir.Value]:
    """Add a shift to the vector that is added behind, and give the former one: it may be unused."""
    node, at = bias
    old = node.inputs[at]
    tensor = constant(old)
    assert old is not None
    assert tensor is not None
    node.replace_input_with(at, writer.constant(to_float64(tensor) + shift, dtype))
    return [old]


def _fixed_bias(use: Use, model: ir.Model) -> ir.TensorProtocol | None:
    """The bias of a Conv or Gemm, where it is a constant in whose place no caller feeds another."""
    return _fixed(use.node.inputs[2] if len(use.node.inputs) > 2 else None, model)


def _fixed(value: ir.Value | None, model: ir.Model) -> ir.TensorProtocol | None:
    """A constant in whose place no caller feeds another; None for whatever else."""
    fed = value is not None and value.is_graph_input() and model.ir_version >= DEFAULT_VALUES_IR
    return None if fed else constant(value)


def _shift_bias(
    use: Use, shift: NDArray[np.float64], writer: "_GraphWriter", fixed: ir.TensorProtocol | None
) -> None:
    """Give a Conv or Gemm, about to be replaced, a bias that makes up for the shift."""
    node = use.node
    alpha, beta = 1.0, 1.0
    if node.op_type == "Gemm":
        alpha, beta = float_attr(node, "alpha", 1.0), float_attr(node, "beta", 1.0)
    shift = alpha * shift
    old = node.inputs[2] if len(node.inputs) > 2 else None
    column = node.op_type == "Gemm" and use.slot == 0  # its outputs are rows
    moved = (shift / (beta or 1.0)).reshape((-1, 1) if column else (-1,))
    if old is None or fixed is not None:
        if fixed is not None:
            moved = moved + to_float64(fixed)
        bias = writer.constant(moved, use.dtype)
    else:
        bias = writer.op("Add", [old, writer.constant(moved, use.dtype)], {})
    if beta == 0.0:
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        bias = writer.constant(shift.reshape(moved.shape), use.dtype)
    node.resize_inputs(3)
    node.replace_input_with(2, bias)


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
