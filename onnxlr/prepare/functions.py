"""Local functions: inlined, so that weights in them and weights handed to them are seen."""

import onnx_ir as ir
from onnx_ir.passes.common import (
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
)

from onnxlr.model.graph import Names
from onnxlr.model.topology import call_counts, check_topology, expanded_node_count

_MOST_NODES = 200_000  # of the inlined model: functions that call functions can grow fast
_MOST_NAMES = 30_000_000  # that are tried: each call tries all that earlier ones have taken


def inline_functions(model: ir.Model) -> ir.Model:
    """A model without local functions; the model itself where that can't be had.

    A weight in a body that is called twice becomes one initializer, not two. What can't be inlined
    (functions that import another opset, that take graphs, that expand beyond bounds) is left as it
    is, and its layers are listed with that reason.
    """
    if not model.functions or expanded_node_count(model) > _MOST_NODES:
        return model
    sizes = {key: sum(1 for _ in f.all_nodes()) for key, f in model.functions.items()}
    if sum(sizes[key] * times**2 for key, times in call_counts(model).items()) > _MOST_NAMES:
        return model
    inlined = model.clone()
    _name_unread(inlined)
    try:
        InlinePass()(inlined)
        check_topology(inlined, "inlined")  # a call may lack what a node of the body needs
    except Exception:  # whatever stops it: the model is right as it is
        return model
    LiftConstantsToInitializersPass()(inlined)
    DeduplicateInitializersPass()(inlined)
    return inlined


def _name_unread(model: ir.Model) -> None:
    """Name what a call leaves out of its outputs: a node of the body has to give it."""
    names = Names(model)
    nodes = [
        *model.graph.all_nodes(),
        *(n for f in model.functions.values() for n in f.all_nodes()),
    ]
    for value in (v for node in nodes for v in node.outputs if v.name):
        names.unused(value.name or "")  # of the bodies
    for node in nodes:
        if node.op_identifier() in model.functions:
            for value in node.outputs:
                value.name = value.name or names.unused("unread")
