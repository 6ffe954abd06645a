"""Following a value back to the constant that it shows, and a constant to all its readers."""

from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from onnxlr.layers.operators import FLOATS
from onnxlr.model.attributes import int_attr, ints_attr
from onnxlr.model.constants import constant
from onnxlr.model.folding import FOLDED
from onnxlr.model.graph import is_standard

_LARGE = 1024  # elements of a matrix that is listed whatever reads it
_VIEWS = ("Identity", "Transpose", "Cast")


@dataclass(frozen=True, eq=False)
class Trace:
    """The constant that a value shows, and what lies between.

    Attributes
    ----------
    root : onnx_ir.Value
        The stored constant.
    perm : tuple of int
        Axes of the constant in the order of the value's.
    dtype : onnx_ir.DataType or None
        The value's type, after any Cast; None where there is a reason.
    reason : str or None
        Why what lies between is more than a view; None if it is a view.
    quantized : bool
        Whether the reason is that the constant is already quantized.
    """

    root: ir.Value
    perm: tuple[int, ...]
    dtype: ir.DataType | None
    reason: str | None
    quantized: bool = False


def trace(value: ir.Value | None) -> Trace | None:
    """Follow a value back to the constant that it shows; None where activations take part."""
    perms: list[tuple[int, ...]] = []
    casts: list[ir.DataType] = []  # from the node back to the constant
    while value is not None:
        tensor = constant(value)
        if tensor is not None:
            perm = tuple(range(len(tensor.shape)))
            for step in reversed(perms):
                order = step or tuple(reversed(range(len(perm))))
                if sorted(order) != list(range(len(perm))):
                    misfit = f"a Transpose by {list(order)} of its {len(perm)} axes makes no sense"
                    return Trace(value, (), None, misfit)
                perm = tuple(perm[i] for i in order)
            reason = _lossy(tensor.dtype, casts[::-1])
            return Trace(value, perm, casts[0] if casts else tensor.dtype, reason)
        node = value.producer()
        if node is None:
            return None
        if is_standard(node, *_VIEWS):
            if node.op_type == "Transpose":
                perms.append(ints_attr(node, "perm", ()))
            if node.op_type == "Cast":
                casts.append(_type(int_attr(node, "to", 1)))
            value = node.inputs[0]
            continue
        origin = _computed_from(node)
        if origin is None:
            return None
        root, unfolded = origin
        if unfolded is not None and unfolded.op_type == "DequantizeLinear":
            reason = "the weight is quantized (DequantizeLinear): left alone"
            return Trace(root, (), None, reason, quantized=True)
        last = unfolded or node
        reason = f"{last.op_type} {last.name or '(unnamed)'!r} computes the weight from constants"
        if unfolded is None:
            reason += ", and would make the file larger if it was stored"
        return Trace(root, (), None, f"{reason}: left alone")
    return None


def _type(number: int) -> ir.DataType:
    try:
        return ir.DataType(number)
    except ValueError:  # no type of ONNX, so none that a weight could be cast to
        return ir.DataType.UNDEFINED


def _lossy(stored: ir.DataType, casts: list[ir.DataType]) -> str | None:
    """Why a row of casts rounds the weight on the way; None if it only changes the type."""
    for before, after in pairwise((stored, *casts)):
        narrows = _bits(after) < _bits(before) and after is not casts[-1]
        if not after.is_floating_point() or narrows:
            return f"a Cast to {after.name.lower()} on the way rounds the weight: fold it first"
    return None


def _bits(kind: ir.DataType) -> int:
    return 0 if kind in (ir.DataType.UNDEFINED, ir.DataType.STRING) else int(kind.bitwidth)


_Origin = tuple[ir.Value, ir.Node | None]


def _computed_from(
    node: ir.Node, depth: int = 64, memo: dict[ir.Node, _Origin | None] | None = None
) -> _Origin | None:
    """The largest constant behind a node, and the last node that can't be folded, if there is one.

    None if anything but constants is behind it.
    """
    if node.op_type.startswith("Random") or depth == 0:
        return None
    memo = {} if memo is None else memo  # paths may be many more than nodes
    roots: list[ir.Value] = []
    unfolded = None if is_standard(node, *FOLDED) else node
    for value in node.inputs:
        if value is None:
            continue
        if constant(value) is not None:
            roots.append(value)
            continue
        producer = value.producer()
        if producer is None:
            return None
        if producer not in memo:
            memo[producer] = _computed_from(producer, depth - 1, memo)
        origin = memo[producer]
        if origin is None:
            return None
        roots.append(origin[0])
        unfolded = unfolded or origin[1]
    root = max(roots, key=_elements, default=None)
    return None if root is None else (root, unfolded)


def _elements(value: ir.Value) -> int:
    tensor = constant(value)
    return int(tensor.size) if tensor is not None else 0


def foreign_user(value: ir.Value, inputs: set[tuple[ir.Node, int]]) -> str | None:
    """A reason if the value, or a view of it, has a reader other than these inputs of nodes."""
    values = [value]
    while values:
        for node, slot in values.pop().uses():
            if (node, slot) in inputs:
                continue
            output = node.outputs[0]
            if not is_standard(node, *_VIEWS) or output.is_graph_output():
                return f"{node.op_type} {node.name or '(unnamed)'!r} also needs the whole weight"
            values.append(output)
    return None


def is_view(node: ir.Node) -> bool:
    """Whether a node only shows what it reads in another order or type."""
    return is_standard(node, *_VIEWS)


def is_large_matrix(value: ir.Value) -> bool:
    """Whether a value shows a constant of real numbers with two sides, and many elements."""
    while (node := value.producer()) is not None and is_view(node) and node.inputs[0] is not None:
        value = node.inputs[0]
    tensor = constant(value)
    if tensor is None or tensor.dtype not in FLOATS or tensor.size < _LARGE:
        return False
    return sum(int(d) > 1 for d in tensor.shape) > 1  # type: ignore[arg-type]


def is_fixed(origin: Trace | None) -> bool:
    """Whether a traced value shows a constant in whose place no caller may feed another."""
    return origin is not None and not origin.root.is_graph_input()
