"""Checks a model with the checker of the onnx package."""

import onnx

from onnxlr.errors import ModelError, one_line
from onnxlr.model.load import Source
from onnxlr.model.protobuf import to_proto


def run_onnx_checker(source: Source) -> None:
    """Check a model with ``onnx.checker``: the only check where nothing is run.

    Raises
    ------
    ModelError
        With the checker's message.
    """
    try:
        if source.external:
            onnx.checker.check_model(source.path or "")
            return
        proto = to_proto(source.model)
        for info in (*proto.graph.input, *proto.graph.output):
            # Runtimes do without shapes, and infer types of outputs; the checker insists on them.
            if info.type.WhichOneof("value") in (None, "tensor_type"):
                tensor = info.type.tensor_type
                tensor.elem_type = tensor.elem_type or onnx.TensorProto.FLOAT
                tensor.shape.SetInParent()
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{source.label} fails the ONNX checker: {one_line(error)}") from None
