"""Values that have as many axes as the sizes that are fed leave them: nothing counts on those.

``x.squeeze()`` is exported as a Squeeze without axes, which drops the batch where that is one.
"""

from collections.abc import Iterable

import onnx_ir as ir

from onnxlr.model import constant, is_standard

# Operators whose outputs have a number of axes of their own, whatever they are fed.
_FIXED = (
    "AveragePool",
    "Conv",
    "ConvInteger",
    "ConvTranspose",
    "Flatten",
    "GRU",
    "Gemm",
    "LSTM",
    "MaxPool",
    "NonMaxSuppression",
    "NonZero",
    "QLinearConv",
    "RNN",
    "Size",
)
_SHAPED = ("Reshape", "Expand", "ConstantOfShape")  # by a list of sizes: one axis for each
_BRANCHED = ("If", "Loop", "Scan", "SequenceAt", "OptionalGetElement")


def open_axes(graph: ir.Graph) -> set[ir.Value]:
    """Values of a graph whose number of axes may differ from one feed to the next.

    Where that can't be told it is taken for open.

    Parameters
    ----------
    graph : onnx_ir.Graph
        The main graph, in order.
    """
    given = [value for value in graph.inputs if not value.is_initializer()]
    if all(_is_static(value) for value in given):
        return set()
    axes: set[ir.Value] = set()  # the number of axes is open
    # Lists that may have as many entries as such a value has axes, or as whoever feeds them likes.
    lengths = {v for v in given if v.shape is not None and len(v.shape) == 1 and not _is_static(v)}
    for node in graph:
        if _is_source(node) or _has_open_axes(node, axes, lengths):
            axes.update(node.outputs)
        if _has_open_length(node, axes, lengths):
            lengths.update(node.outputs)
    return axes


def _is_source(node: ir.Node) -> bool:
    """Whether the number of axes hangs on sizes or values here."""
    if is_standard(node, "Squeeze"):
        named = len(node.inputs) > 1 and node.inputs[1] is not None
        return not named and "axes" not in node.attributes and not _is_static(node.inputs[0])
    return is_standard(node, *_BRANCHED) and any(out.shape is None for out in node.outputs)


def _has_open_axes(node: ir.Node, axes: set[ir.Value], lengths: set[ir.Value]) -> bool:
    if is_standard(node, "Shape", *_FIXED):
        return False
    if is_standard(node, *_SHAPED):
        sizes = node.inputs[-1] if node.op_type == "ConstantOfShape" else node.inputs[1]
        expanded = node.op_type == "Expand" and _any_of(node.inputs[:1], axes)
        return expanded or _any_of([sizes], lengths)
    return _any_of(node.inputs, axes)


def _has_open_length(node: ir.Node, axes: set[ir.Value], lengths: set[ir.Value]) -> bool:
    if is_standard(node, "Shape"):
        return _any_of(node.inputs, axes)
    if is_standard(node, "Gather"):  # as many as are looked up
        return _any_of(node.inputs[1:], lengths)
    return not is_standard(node, "Size", *_SHAPED) and _any_of(node.inputs, lengths)


def _any_of(values: Iterable[ir.Value | None], those: set[ir.Value]) -> bool:
    return any(value in those for value in values if value is not None)


def _is_static(value: ir.Value | None) -> bool:
    if value is None or constant(value) is not None:
        return True
    return value.shape is not None and all(isinstance(d, int) and d > 0 for d in value.shape)
