"""Local functions: inlined, so that the weights in them and those handed to them are layers."""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import (
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
)

from onnxlr.errors import one_line
from onnxlr.model.graph import Names
from onnxlr.model.topology import call_counts, check_topology, expanded_node_count

_MOST_NODES = 200_000  # nodes of the inlined model: functions that call functions can grow fast
_MOST_NAMES = 30_000_000  # names that inlining tries: each call tries those of all earlier ones


@dataclass(frozen=True, eq=False)
class Inlining:
    """What ``inline_functions`` made of a model.

    Attributes
    ----------
    model : onnx_ir.Model
        The model without local functions, or the original where there is a refusal.
    refusal : str or None
        Why its functions are not inlined.
    """

    model: ir.Model
    refusal: str | None = None


def inline_functions(model: ir.Model) -> Inlining:
    """Inline the local functions of a model, where that is possible.

    A weight in a body that is called twice becomes one initializer, not two. Functions that import
    another opset, that take graphs or that expand beyond bounds stay, with all others of the model.
    """
    if not model.functions:
        return Inlining(model)
    if (count := expanded_node_count(model)) > _MOST_NODES:
        return Inlining(model, f"inlining its functions would make {count:,} nodes")
    sizes = {key: sum(1 for _ in f.all_nodes()) for key, f in model.functions.items()}
    if sum(sizes[key] * times**2 for key, times in call_counts(model).items()) > _MOST_NAMES:
        return Inlining(model, "its functions have too many calls to be inlined")
    inlined = model.clone()
    _name_unread_outputs(inlined)
    try:
        InlinePass()(inlined)
        check_topology(inlined, "inlined")  # a call may lack what a node of the body needs
    except Exception as error:  # whatever stops it: the model is right as it is
        return Inlining(model, f"inlining its functions fails: {one_line(error)}")
    LiftConstantsToInitializersPass()(inlined)
    DeduplicateInitializersPass()(inlined)
    return Inlining(inlined)


def _name_unread_outputs(model: ir.Model) -> None:
    """Name the outputs that a call leaves out: a node of the body has to write to them."""
    names = Names(model)
    nodes = [
        *model.graph.all_nodes(),
        *(n for f in model.functions.values() for n in f.all_nodes()),
    ]
    for value in (v for node in nodes for v in node.outputs if v.name):
        names.unused(value.name or "")  # names in the bodies are taken too
    for node in nodes:
        if node.op_identifier() in model.functions:
            for value in node.outputs:
                value.name = value.name or names.unused("unread")
