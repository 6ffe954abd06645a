"""Local functions: inlined, so that weights in them and weights handed to them are seen."""

import onnx_ir as ir
from onnx_ir.passes.common import (
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
)

_MOST_NODES = 200_000  # of the inlined model: functions that call functions can grow without bound


def inline_functions(model: ir.Model) -> ir.Model:
    """A model without local functions; the model itself where that can't be had.

    A weight in a body that is called twice becomes one initializer, not two. What can't be inlined
    (functions that call themselves, that import another opset, that take graphs, that expand beyond
    bounds) is left as it is, and its layers are listed with that reason.
    """
    if not model.functions or _expanded(model) > _MOST_NODES:
        return model
    inlined = model.clone()
    try:
        InlinePass()(inlined)
    except Exception:  # whatever stops it: the model is right as it is
        return model
    LiftConstantsToInitializersPass()(inlined)
    DeduplicateInitializersPass()(inlined)
    return inlined


def _expanded(model: ir.Model) -> float:
    """Nodes of the model with every call replaced by its body; infinite for endless recursion."""
    known: dict[ir.OperatorIdentifier, float] = {}
    waiting: list[tuple[ir.OperatorIdentifier, bool]] = [(key, False) for key in model.functions]
    open_: set[ir.OperatorIdentifier] = set()

    def size(node: ir.Node) -> float:
        return known.get(node.op_identifier(), 1.0)

    while waiting:  # no recursion of our own: calls may be nested deeper than Python's stack
        key, done = waiting.pop()
        if done:
            known[key] = sum(size(node) for node in model.functions[key].all_nodes())
            open_.discard(key)
            continue
        if key in known:
            continue
        if key in open_:
            return float("inf")
        open_.add(key)
        waiting.append((key, True))
        for node in model.functions[key].all_nodes():
            inner = node.op_identifier()
            if inner in model.functions and inner not in known:
                waiting.append((inner, False))
    return sum(size(node) for node in model.graph.all_nodes())
