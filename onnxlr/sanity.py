"""What a model must be before anything is done with it: versions, weights and wiring."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir

from onnxlr.errors import ModelError

OLDEST_OPSET = 7
ONNX_DOMAINS = ("", "ai.onnx")


def check_versions(proto: onnx.ModelProto, label: str) -> None:
    """Refuse what isn't a model, and opsets and IR versions outside the range."""
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{label} is not an ONNX model: it holds no graph or no opset")
    for entry in proto.opset_import:
        if entry.domain not in ONNX_DOMAINS:
            continue
        newest = onnx.defs.onnx_opset_version()
        if entry.version > newest:
            raise ModelError(
                f"{label} uses opset {entry.version}, onnx {onnx.__version__} knows up to "
                f"{newest}: upgrade onnx and onnxruntime, or export at an older opset"
            )
        if entry.version < OLDEST_OPSET:
            raise ModelError(
                f"{label} uses opset {entry.version}, the oldest supported is {OLDEST_OPSET}: "
                "convert it with onnx.version_converter"
            )
    if proto.graph.sparse_initializer:
        raise ModelError(
            f"{label} stores {proto.graph.sparse_initializer[0].values.name!r} as a sparse "
            "initializer: not supported, store it dense"
        )
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{label} has IR version {proto.ir_version}, onnx {onnx.__version__} knows up to "
            f"{onnx.IR_VERSION}: upgrade onnx"
        )


def check_tensors(proto: onnx.ModelProto, label: str) -> None:
    """Refuse tensors whose data isn't as long as their shape says."""
    for tensor in _all_tensors(proto):
        if any(d < 0 for d in tensor.dims):
            raise ModelError(f"{label}: the weight {tensor.name!r} has shape {list(tensor.dims)}")
        if tensor.data_location == onnx.TensorProto.EXTERNAL or not tensor.HasField("raw_data"):
            continue
        needed = _nbytes(tensor)
        if needed is not None and len(tensor.raw_data) != needed:
            raise ModelError(
                f"{label}: the weight {tensor.name!r} of shape {list(tensor.dims)} needs "
                f"{needed:,} bytes and has {len(tensor.raw_data):,}: export the model again"
            )


def check_wiring(model: ir.Model, label: str) -> None:
    """Refuse inputs that nothing produces, and cycles; sort what is merely out of order."""
    for graph in (model.graph, *model.graph.subgraphs()):
        order = {node: i for i, node in enumerate(graph)}
        sorted_ = True
        for node, i in order.items():
            _check_arity(node, model, label)
            for value in node.inputs:
                if value is None:
                    continue
                producer = value.producer()
                if producer is None and not (value.is_graph_input() or value.is_initializer()):
                    raise ModelError(
                        f"{label}: {node.op_type} {node.name or '(unnamed)'!r} reads "
                        f"{value.name!r}, which nothing produces"
                    )
                sorted_ = sorted_ and (producer is None or order.get(producer, -1) < i)
        if not sorted_:
            try:
                graph.sort()
            except ValueError:
                raise ModelError(f"{label}: its nodes form a cycle") from None


def _check_arity(node: ir.Node, model: ir.Model, label: str) -> None:
    """Refuse a standard operator that lacks an input it can't do without."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OLDEST_OPSET))
    if node.domain not in ONNX_DOMAINS or not onnx.defs.has(node.op_type, version):
        return
    least = onnx.defs.get_schema(node.op_type, version).min_input
    if len(node.inputs) < least:
        raise ModelError(
            f"{label}: {node.op_type} {node.name or '(unnamed)'!r} has {len(node.inputs)} "
            f"inputs, it needs {least}"
        )


def external_files(
    proto: onnx.ModelProto, path: Path | None, label: str
) -> tuple[tuple[str, int, int], ...]:
    """Location, bytes and time of change of every external data file, each there in full."""
    files: dict[str, tuple[str, int, int]] = {}
    for tensor in _all_tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        if path is None:
            raise ModelError(
                f"the weight {tensor.name!r} is in external data ({location!r}), which a model "
                "in memory doesn't have: give the path of the model"
            )
        parts = PurePosixPath(location.replace("\\", "/"))
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
            raise ModelError(
                f"{label}: the external data of {tensor.name!r} is at {location!r}, which is "
                "no file or outside the model's folder; refused"
            )
        file = path.parent / location
        if not file.is_file():
            raise ModelError(
                f"{label}: the external data of {tensor.name!r} is missing: {file}; "
                "copy it beside the model"
            )
        if file.resolve() != path.parent.resolve() / parts:
            raise ModelError(
                f"{label}: {file} is a link to {file.resolve()}: external data must be files of "
                "their own; copy the model and its data without links (cp -L)"
            )
        about = file.stat()
        if about.st_nlink > 1:
            raise ModelError(
                f"{label}: {file} is a hard link, one of {about.st_nlink} names of its file: "
                "external data must be files of their own; copy the model and its data"
            )
        size = about.st_size
        end = _external_end(tensor, entries, label)
        if end > size:
            raise ModelError(
                f"{label}: {file} holds {size:,} bytes, {tensor.name!r} ends at {end:,}: "
                "it is cut short, copy it again"
            )
        files[location] = (location, size, about.st_mtime_ns)
    return tuple(files[location] for location in sorted(files))


def _external_end(tensor: onnx.TensorProto, entries: Mapping[str, str], label: str) -> int:
    """Where in its file a tensor ends."""
    numbers = {"offset": 0, "length": _nbytes(tensor) or 0}
    for key in numbers:
        text = entries.get(key, "")
        if text:
            if not text.isdecimal():
                raise ModelError(
                    f"{label}: the external data of {tensor.name!r} has {key} {text!r}, which is "
                    "no number of bytes"
                )
            numbers[key] = int(text)
    return numbers["offset"] + numbers["length"]


def _nbytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes that a tensor's elements take; None for strings and types unknown here."""
    try:
        kind = ir.DataType(tensor.data_type)
        bits = int(kind.bitwidth)
    except (ValueError, TypeError):
        return None
    return -(-math.prod(int(d) for d in tensor.dims) * bits // 8)


def _all_tensors(proto: onnx.ModelProto) -> Iterable[onnx.TensorProto]:
    return onnx.external_data_helper._get_all_tensors(proto)
