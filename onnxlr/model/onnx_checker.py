"""A model held against the ONNX checker."""

import onnx

from onnxlr.errors import ModelError, one_line
from onnxlr.model.load import Source
from onnxlr.model.protobuf import to_proto


def run_onnx_checker(source: Source) -> None:
    """Hold a model against the ONNX checker; all that is done where nothing is run.

    Raises
    ------
    ModelError
        With what the checker says.
    """
    try:
        if source.external:
            onnx.checker.check_model(source.path or "")
            return
        proto = to_proto(source.model)
        for output in proto.graph.output:
            # Runtimes find out the shapes of outputs themselves; the checker insists on some.
            if output.type.WhichOneof("value") in (None, "tensor_type"):
                tensor = output.type.tensor_type
                tensor.elem_type = tensor.elem_type or onnx.TensorProto.FLOAT
                tensor.shape.SetInParent()
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{source.label} fails the ONNX checker: {one_line(error)}") from None
