"""Checks a model with the checker of the onnx package."""

import onnx
from onnx.external_data_helper import uses_external_data

from onnxlr.errors import ModelError, one_line
from onnxlr.model.checks import ONNX_DOMAINS
from onnxlr.model.load import Source
from onnxlr.model.protobuf import messages_in, to_proto

_UNKNOWN = "onnxlr.unknown"


def run_onnx_checker(source: Source, *, plugins: bool = False) -> None:
    """Check a model with ``onnx.checker``: the only check where nothing is run.

    Parameters
    ----------
    source : Source
    plugins : bool
        Whether operators of the standard domain may be others than it has.

    Raises
    ------
    ModelError
        With the checker's message.
    """
    proto = to_proto(source.model)
    unknown = _set_apart_unknown(proto) if plugins else 0
    try:
        if source.external and not unknown:
            onnx.checker.check_model(source.path or "")
            return
        for tensor in [t for t in proto.graph.initializer if uses_external_data(t)]:
            proto.graph.initializer.remove(tensor)  # it lies beside the file, not beside us
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.input.append(info)
        for info in (*proto.graph.input, *proto.graph.output):
            # Runtimes do without shapes, and infer types of outputs; the checker insists on them.
            if info.type.WhichOneof("value") in (None, "tensor_type"):
                tensor_type = info.type.tensor_type
                tensor_type.elem_type = tensor_type.elem_type or onnx.TensorProto.FLOAT
                tensor_type.shape.SetInParent()
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{source.label} fails the ONNX checker: {one_line(error)}") from None


def _set_apart_unknown(proto: onnx.ModelProto) -> int:
    """Put operators of the standard domain that no schema knows into another, and count them.

    Plugins of TensorRT are there, which the checker has no word on.
    """
    version = max((o.version for o in proto.opset_import if o.domain in ONNX_DOMAINS), default=1)
    count = 0
    for message in messages_in(proto):
        if (
            isinstance(message, onnx.NodeProto)
            and message.domain in ONNX_DOMAINS
            and not onnx.defs.has(message.op_type)
        ):
            message.domain = _UNKNOWN
            count += 1
    if count:
        proto.opset_import.append(onnx.helper.make_opsetid(_UNKNOWN, version))
    return count
