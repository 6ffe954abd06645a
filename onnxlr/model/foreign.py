"""Models as other libraries hold them: torch's exporter, onnx-ir and ONNX GraphSurgeon."""

import sys
from typing import Any

import onnx
import onnx_ir as ir

from onnxlr.model.protobuf import to_proto


def as_message(model: Any) -> Any:
    """A model of another library as a ``ModelProto``; anything else as it is.

    Nothing is imported for it: what made the model has been.

    Parameters
    ----------
    model : onnx_ir.Model, torch.onnx.ONNXProgram, onnx_graphsurgeon.Graph, or anything
    """
    if isinstance(model, ir.Model):
        return to_proto(model)
    surgeon = sys.modules.get("onnx_graphsurgeon")
    if surgeon is not None and isinstance(model, surgeon.Graph):
        return surgeon.export_onnx(model)
    message = getattr(model, "model_proto", None)  # of an ONNXProgram
    if isinstance(message, onnx.ModelProto):
        return message
    return model
