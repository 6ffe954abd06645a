"""Identity nodes on constants: exporters write one for each further name of equal parameters."""

import onnx_ir as ir

from onnxlr.layers.tracing import is_fixed, trace
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard, remove_unused


def drop_identities(model: ir.Model) -> int:
    """Have readers of a constant behind an Identity read it itself; return how many are gone.

    What bodies read stays as it is, since a name there may mean something else.
    """
    count = 0
    for node in list(model.graph):
        value = node.inputs[0] if is_standard(node, "Identity") and node.inputs else None
        if value is None or constant(value) is None or not is_fixed(trace(value)):
            continue
        output = node.outputs[0]
        here = all(user.graph is model.graph for user, _ in output.uses())
        if here and output.uses() and not output.is_graph_output():
            output.replace_all_uses_with(value)
            remove_unused([output])
            count += 1
    return count
