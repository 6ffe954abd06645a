"""Products with a constant matrix and look-ups by other operators, as MatMul, Gemm, Conv, Gather.

Einsum says many things, some of which are a plain product, and GatherND some that Gather says. ONNX
Runtime's optimizer saves products fused with what is beside them, and fuses them again when it
loads what is written here.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.layers.axes import axis_counts
from onnxlr.layers.tracing import is_fixed, trace
from onnxlr.model.attributes import float_attr, int_attr, ints_attr, str_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import (
    Names,
    add_initializer,
    all_graphs,
    copy_metadata,
    is_standard,
    opset,
    remove_unused,
)
from onnxlr.types import Shape

_AXES_INPUTS = 13  # since this opset, the axes of an Unsqueeze are an input
_CLIP_INPUTS = 11  # since this opset, the bounds of a Clip are inputs

_Matrices = dict[tuple[ir.Graph, ir.Value | None, tuple[int, ...], Shape], ir.Value | None]


class _Writer:
    """Writes the nodes that replace one."""

    def __init__(
        self,
        graph: ir.Graph,
        node: ir.Node,
        names: Names,
        version: int,
        axes: Mapping[ir.Value, int],
        matrices: "_Matrices",
    ) -> None:
        self.graph, self.node, self.version = graph, node, version
        self.nodes: list[ir.Node] = []
        self._names, self._axes, self._matrices = names, axes, matrices

    def op(self, op_type: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        """Add a node and return its output."""
        node = ir.node(op_type, inputs, attributes)  # type: ignore[arg-type]
        stem = self.node.name or self.node.outputs[0].name
        node.name = self._names.unused(f"{stem}/{op_type.lower()}")
        node.outputs[0].name = self._names.unused(f"{self.node.outputs[0].name}/{op_type.lower()}")
        self.nodes.append(node)
        return node.outputs[0]

    def matrix(self, w: ir.Value | None, order: tuple[int, ...], shape: Shape) -> ir.Value | None:
        """A weight with its axes in this order and of this shape: one for all who want the same."""
        key = self.graph, w, order, shape
        if key not in self._matrices:
            tensor = constant(w)
            assert tensor is not None
            if order != tuple(range(len(order))):
                w = self.op("Transpose", [w], perm=order)
            if tuple(tensor.shape[i] for i in order) != shape:
                w = self.op("Reshape", [w, self.array(np.array(shape))])
            self._matrices[key] = w
        return self._matrices[key]

    def in_order(
        self, value: ir.Value | None, letters: Sequence[str], wanted: Sequence[str]
    ) -> ir.Value | None:
        """A value with its axes, one for each letter, in the order that is wanted."""
        perm = [list(letters).index(letter) for letter in wanted]
        if perm == sorted(perm):
            return value
        return self.op("Transpose", [value], perm=perm)

    def array(self, values: NDArray[np.generic]) -> ir.Value:
        """Add a small constant."""
        name = self._names.unused(f"{self.node.outputs[0].name}/constant")
        return add_initializer(self.graph, name, values)

    def axes_of(self, value: ir.Value | None) -> int | None:
        """How many axes a value has; None where that isn't sure."""
        tensor = constant(value)
        if tensor is not None:
            return len(tensor.shape)
        return None if value is None else self._axes.get(value)

    def discard(self) -> None:
        """Have the nodes read nothing any more: they aren't needed."""
        for written in self.nodes:
            for i in range(len(written.inputs)):
                written.replace_input_with(i, None)

    def install(self, output: ir.Value) -> None:
        """Put the nodes in the place of the old one, whose name the one with its weight takes."""
        for written in self.nodes:
            copy_metadata(self.node, written)
            if is_standard(written, "MatMul", "Gemm", "Conv", "Gather"):
                written.name = self.node.name
        copy_metadata(self.node.outputs[0], output)
        ir.convenience.replace_nodes_and_values(
            self.graph, self.node, [self.node], self.nodes, [self.node.outputs[0]], [output]
        )


def write_plain_products(model: ir.Model) -> int:
    """Write products with a constant matrix as plain ones, in place, and return their number.

    Weights are reshaped by nodes, which ``fold_weights`` folds.
    """
    names, version = Names(model), opset(model)
    axes = axis_counts(model.graph)
    matrices: _Matrices = {}
    count = 0
    for graph in all_graphs(model):
        for node in list(graph):
            domain = "" if is_standard(node, node.op_type) else node.domain
            rule = _RULES.get((domain, node.op_type))
            if rule is None or not any(is_fixed(trace(v)) for v in node.inputs[:2]):
                continue
            writer = _Writer(graph, node, names, version, axes, matrices)
            output = rule(node, writer)
            if output is None:
                writer.discard()
            else:
                read = [v for v in node.inputs if v is not None]
                writer.install(output)
                remove_unused(read)
                count += 1
    return count


def _einsum(node: ir.Node, writer: _Writer) -> ir.Value | None:
    """An Einsum of data with axes to sum over at their end, and a weight with all of these."""
    slots = [i for i, v in enumerate(node.inputs) if is_fixed(trace(v))]
    left, _, out = str_attr(node, "equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    if len(slots) != 1 or len(terms) != 2 or len(node.inputs) != 2 or not out:
        return None
    x, w = node.inputs[1 - slots[0]], node.inputs[slots[0]]
    data, weight = terms[1 - slots[0]], terms[slots[0]]
    summed, kept = [c for c in data if c in weight], [c for c in weight if c not in data]
    lead = data[: len(data) - len(summed)]
    tensor = constant(w)
    new = out.removeprefix(lead)
    fits = (summed and kept and lead and weight.isalpha() and len(set(weight)) == len(weight)) and (
        data == lead + "".join(summed) and out == lead + new and sorted(new) == sorted(kept)
    )
    if tensor is None or ("." in lead and max(len(summed), len(new)) > 1):
        return None
    if not fits:
        return _einsum_in_order(x, w, (data, weight, out), writer)
    sizes = dict(zip(weight, (int(d) for d in tensor.shape), strict=True))  # type: ignore[arg-type]
    order = tuple(weight.index(c) for c in (*summed, *new))
    rows, columns = (int(np.prod([sizes[c] for c in part])) for part in (summed, new))
    w = writer.matrix(w, order, (rows, columns))
    if len(summed) > 1:
        flat = np.array([0] * len(lead) + [rows])
        x = writer.op("Reshape", [x, writer.array(flat)])
    y = writer.op("MatMul", [x, w])
    if len(new) > 1:
        whole = np.array([0] * len(lead) + [sizes[c] for c in new])
        y = writer.op("Reshape", [y, writer.array(whole)])
    return y


def _einsum_in_order(
    x: ir.Value | None, w: ir.Value | None, terms: tuple[str, str, str], writer: _Writer
) -> ir.Value | None:
    """An Einsum whose axes have another order, or whose weight is a matrix for each of an axis."""
    data, weight, out = terms
    stack = [c for c in weight if c in data and c in out]
    lead = [c for c in data if c not in weight]
    summed = [c for c in weight if c in data and c not in out]
    new = [c for c in out if c not in data]
    once = all(term.isalpha() and len(set(term)) == len(term) for term in terms)
    whole = {*stack, *summed, *new} == {*weight} and {*stack, *lead, *new} == {*out}
    if not (once and whole and lead and summed and new) or len(stack) > 1:
        return None
    if stack and len(lead) > 1:  # their axes don't meet those of the weight
        return None
    tensor = constant(w)
    assert tensor is not None
    sizes = dict(zip(weight, (int(d) for d in tensor.shape), strict=True))  # type: ignore[arg-type]
    rows, columns = (int(np.prod([sizes[c] for c in part])) for part in (summed, new))
    order = tuple(weight.index(c) for c in (*stack, *summed, *new))
    w = writer.matrix(w, order, (*(sizes[c] for c in stack), rows, columns))
    x = writer.in_order(x, data, (*stack, *lead, *summed))
    kept = [0] * len((*stack, *lead))  # sizes that a Reshape copies
    if len(summed) > 1:
        x = writer.op("Reshape", [x, writer.array(np.array([*kept, rows]))])
    y = writer.op("MatMul", [x, w])
    if len(new) > 1:
        y = writer.op("Reshape", [y, writer.array(np.array([*kept, *(sizes[c] for c in new)]))])
    return writer.in_order(y, (*stack, *lead, *new), out)


def _gather_nd(node: ir.Node, writer: _Writer) -> ir.Value | None:
    """A GatherND of whole entries along the first axis: a Gather, as of a table or of experts."""
    table, indices = node.inputs[:2]
    behind = None if indices is None else indices.producer()
    rank, version = writer.axes_of(indices), writer.version
    if not is_fixed(trace(table)) or int_attr(node, "batch_dims", 0) or rank is None:
        return None
    if behind is None or not is_standard(behind, "Unsqueeze"):
        return None
    axes: Sequence[int] | None = ints_attr(behind, "axes", ())
    if version >= _AXES_INPUTS:
        axes = _integers(behind.inputs[1]) if len(behind.inputs) > 1 else None
    if axes is None or [a % rank for a in axes] != [rank - 1]:
        return None
    return writer.op("Gather", [table, behind.inputs[0]], axis=0)


def _integers(value: ir.Value | None) -> list[int] | None:
    tensor = constant(value)
    return None if tensor is None else [int(v) for v in np.asarray(tensor.numpy()).ravel()]


def _fused_matmul(node: ir.Node, writer: _Writer) -> ir.Value | None:
    """A MatMul fused with transposes of what it multiplies, and with a scale."""
    if int_attr(node, "transBatchA", 0) or int_attr(node, "transBatchB", 0):
        return None
    sides = []
    for value, flag in zip(node.inputs[:2], ("transA", "transB"), strict=True):
        count = writer.axes_of(value)
        if not int_attr(node, flag, 0):
            sides.append(value)
        elif count is None or count < 2:
            return None
        else:
            perm = (*range(count - 2), count - 1, count - 2)
            sides.append(writer.op("Transpose", [value], perm=perm))
    y = writer.op("MatMul", sides)
    alpha, dtype = float_attr(node, "alpha", 1.0), node.inputs[0].dtype if node.inputs[0] else None
    if alpha == 1.0:
        return y
    if dtype is None:
        return None
    return writer.op("Mul", [y, writer.array(np.array(alpha, dtype.numpy()))])


def _fused_gemm(node: ir.Node, writer: _Writer) -> ir.Value | None:
    """A Gemm fused with an activation."""
    y = writer.op("Gemm", [*node.inputs], **_others(node, "activation"))
    parameters = [float_attr(node, f"activation_{n}", 0.0) for n in ("alpha", "beta")]
    return _activation(node, y, parameters, writer)


def _fused_conv(node: ir.Node, writer: _Writer) -> ir.Value | None:
    """A Conv fused with a sum and an activation."""
    y = writer.op("Conv", [*node.inputs[:3]], **_others(node, "activation"))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        y = writer.op("Add", [y, node.inputs[3]])
    parameters = node.attributes.get("activation_params")
    return _activation(node, y, [] if parameters is None else [*parameters.as_floats()], writer)


def _others(node: ir.Node, prefix: str) -> dict[str, object]:
    """A node's attributes except those whose names begin so."""
    return {n: a.value for n, a in node.attributes.items() if not n.startswith(prefix)}


def _activation(
    node: ir.Node, y: ir.Value, parameters: list[float], writer: _Writer
) -> ir.Value | None:
    """The activation that a node is fused with; None for one that isn't known."""
    name = str_attr(node, "activation", "")
    match name, parameters:
        case ("", _):
            return y
        case ("Relu" | "Tanh" | "Sigmoid", _):
            return writer.op(name, [y])
        case ("LeakyRelu", [alpha, *_]):
            return writer.op(name, [y], alpha=alpha)
        case ("HardSigmoid", [alpha, beta, *_]):
            return writer.op(name, [y], alpha=alpha, beta=beta)
        case ("Clip", [low, high, *_]) if writer.version < _CLIP_INPUTS:
            return writer.op(name, [y], min=low, max=high)
        case ("Clip", [low, high, *_]):
            dtype = node.inputs[1].dtype if node.inputs[1] is not None else None
            bounds = [np.array(b, (dtype or ir.DataType.FLOAT).numpy()) for b in (low, high)]
            return writer.op(name, [y, *map(writer.array, bounds)])
    return None


_RULES: dict[tuple[str, str], Callable[[ir.Node, _Writer], ir.Value | None]] = {
    ("", "Einsum"): _einsum,
    ("", "GatherND"): _gather_nd,
    ("com.microsoft", "FusedMatMul"): _fused_matmul,
    ("com.microsoft", "FusedGemm"): _fused_gemm,
    ("com.microsoft", "FusedConv"): _fused_conv,
}
