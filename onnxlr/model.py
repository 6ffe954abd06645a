"""Reading, preparing, counting and writing ONNX models."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray

from onnxlr.errors import ModelError, OutputError, UsageError

OLDEST_OPSET = 7
PROTOBUF_LIMIT = 2**31 - 1
ONNX_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, eq=False)
class Source:
    """A model as the user gave it.

    Attributes
    ----------
    model : onnx_ir.Model
        Never changed by later stages: they work on clones, which share the weights.
    label : str
        What messages call it: the path, or ``<model>``.
    path : Path or None
        Where it came from, when it came from a file.
    digest : str
        SHA-256 of the serialized model and of its external data's names and sizes.
    nbytes : int
        Size in bytes, external data included.
    external : tuple of str
        Locations of external data files, relative to the model's folder.
    """

    model: ir.Model
    label: str
    path: Path | None
    digest: str
    nbytes: int
    external: tuple[str, ...] = ()


def load(model: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Source:
    """Read a model from a path, from bytes or from a ``ModelProto``.

    Weights in external data stay on disk until they are used.

    Raises
    ------
    ModelError
        If it isn't a readable ONNX model of opset 7 to the newest this ``onnx`` knows, or its
        external data is missing, short or outside its folder.
    """
    path = None
    if isinstance(model, onnx.ModelProto):
        label, proto = "<model>", model
        data = _serialize(proto, label)
    else:
        if isinstance(model, bytes):
            label, data = "<model>", model
        else:
            path = Path(model)
            label = str(path)
            data = _read(path)
        proto = onnx.ModelProto()
        try:
            proto.ParseFromString(data)
        except DecodeError:
            raise ModelError(
                f"{label} ({len(data):,} bytes) is not an ONNX model, or is cut short: "
                "export or copy it again"
            ) from None
    _check_versions(proto, label)
    external = _external_files(proto, path, label)
    digest = hashlib.sha256(data)
    nbytes = len(data)
    del data
    for location, size in external.items():
        digest.update(f"{location}:{size}".encode())
        nbytes += size
    try:
        built = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises whatever the malformed part trips over
        raise ModelError(f"{label} is malformed: {one_line(error)}") from None
    if path is not None:
        for graph in all_graphs(built):
            ir.external_data.set_base_dir(graph, path.parent)
    return Source(built, label, path, digest.hexdigest(), nbytes, tuple(external))


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, then every subgraph of it."""
    yield model.graph
    yield from model.graph.subgraphs()


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is one of these operators of the standard domain."""
    return node.op_type in op_types and node.domain in ONNX_DOMAINS


def opset(model: ir.Model) -> int:
    """Version of the standard operator set that the model imports."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", OLDEST_OPSET))


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output; None for anything else."""
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or not is_standard(node, "Constant") or len(node.attributes) != 1:
        return None
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:  # sparse constants
        return None


def int_attr(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.as_int()


def float_attr(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or its default."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.as_float()


def ints_attr(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A list-of-integers attribute, or its default."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else tuple(attr.as_ints())


def str_attr(node: ir.Node, name: str, default: str) -> str:
    """A string attribute, or its default."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.as_string()


def count_params(model: ir.Model) -> int:
    """Number of floating-point and quantized weight elements, each stored tensor counted once.

    Initializers and Constant nodes of every graph and function count; integers of more than
    8 bits (indices, shapes) don't.
    """
    total = 0
    for graph in all_graphs(model):
        total += sum(_weight_size(v.const_value) for v in graph.initializers.values())
    nodes = list(model.graph.all_nodes())
    nodes += [n for function in model.functions.values() for n in function.all_nodes()]
    for node in nodes:
        if is_standard(node, "Constant"):
            total += _weight_size(constant(node.outputs[0]))
    return total


def _weight_size(tensor: ir.TensorProtocol | None) -> int:
    if tensor is None:
        return 0
    kind = tensor.dtype
    counts = kind.is_floating_point() or (kind.is_integer() and kind.bitwidth <= 8)
    return int(tensor.size) if counts else 0


class Names:
    """Hands out names that nothing in a model has: tensors and nodes share one pool."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        for graph in all_graphs(model):
            self._taken.update(v.name for v in graph.inputs if v.name)
            self._taken.update(graph.initializers)
        for node in model.graph.all_nodes():
            self._taken.update(v.name for v in node.outputs if v.name)
            self._taken.add(node.name or "")

    def unused(self, name: str) -> str:
        """The name itself, or with the first number that makes it unique; taken from now on."""
        candidate, i = name, 1
        while candidate in self._taken:
            candidate, i = f"{name}_{i}", i + 1
        self._taken.add(candidate)
        return candidate


def fold_batch_norms(model: ir.Model) -> int:
    """Fold every inference BatchNormalization into the Conv before it, in place.

    Only where the Conv's output goes nowhere else, all parameters are constants, and the weight
    belongs to this Conv alone. Done before factorizing because the scale decides which output
    channels matter. Returns the number folded.
    """
    folded, names, version = 0, Names(model), opset(model)
    for graph in all_graphs(model):
        for node in list(graph):
            if is_standard(node, "BatchNormalization"):
                folded += _fold_batch_norm(graph, node, names, version)
    return folded


def _fold_batch_norm(graph: ir.Graph, norm: ir.Node, names: Names, version: int) -> bool:
    inner = norm.inputs[0]
    conv = inner.producer() if inner is not None else None
    if inner is None or conv is None or not is_standard(conv, "Conv") or conv.graph is not graph:
        return False
    if inner.is_graph_output() or len(inner.uses()) != 1 or len(norm.inputs) != 5:
        return False
    if any(v.uses() or v.is_graph_output() for v in norm.outputs[1:]):
        return False
    if int_attr(norm, "training_mode", 0) or (version < 9 and not int_attr(norm, "spatial", 1)):
        return False
    weight = conv.inputs[1]
    old_bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    stored = constant(weight)
    parameters = [constant(v) for v in norm.inputs[1:]]
    bias_tensor = constant(old_bias)
    if weight is None or stored is None or len(weight.uses()) != 1 or weight.is_graph_output():
        return False
    if None in parameters or (old_bias is not None and bias_tensor is None):
        return False
    scale, shift, mean, variance = (to_float64(t) for t in parameters if t is not None)
    factor = scale / np.sqrt(variance + float_attr(norm, "epsilon", 1e-5))
    bias = to_float64(bias_tensor) if bias_tensor is not None else np.zeros_like(mean)
    kernel = to_float64(stored)
    dtype = stored.dtype.numpy()
    new_kernel = (kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))).astype(dtype)
    new_bias = ((bias - mean) * factor + shift).astype(dtype)
    if not (np.isfinite(new_kernel).all() and np.isfinite(new_bias).all()):
        return False
    stem = weight.name or conv.name or "conv"
    weights = [
        add_initializer(graph, names.unused(f"{stem}/batch_norm_folded"), new_kernel, stored.dtype),
        add_initializer(
            graph, names.unused(f"{stem}/batch_norm_folded_bias"), new_bias, stored.dtype
        ),
    ]
    replacement = ir.Node(
        "", "Conv", [conv.inputs[0], *weights], conv.attributes.values(), name=conv.name
    )
    stale = [v for v in (*conv.inputs[1:], *norm.inputs[1:]) if v is not None]
    ir.convenience.replace_nodes_and_values(
        graph, norm, [conv, norm], [replacement], [norm.outputs[0]], [replacement.outputs[0]]
    )
    remove_unused(stale)
    return True


def add_initializer(
    graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType | None = None
) -> ir.Value:
    """Register a new initializer, stored as ``dtype`` (by default the array's own type)."""
    stored = dtype or ir.DataType.from_numpy(array.dtype)
    tensor = ir.Tensor(
        np.ascontiguousarray(array, dtype=stored.numpy()), dtype=stored, name=name
    )
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(stored), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def remove_unused(values: list[ir.Value]) -> None:
    """Drop the initializers and nodes among these values' sources that nothing uses any more."""
    for value in values:
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is None:
            graph = value.graph
            if isinstance(graph, ir.Graph) and value.name in graph.initializers:
                graph.initializers.pop(value.name)
                if value in graph.inputs:  # an initializer declared as an input as well
                    graph.inputs.remove(value)
        elif node.graph is not None and not any(v.uses() for v in node.outputs):
            inputs = [v for v in node.inputs if v is not None]
            node.graph.remove(node, safe=True)
            remove_unused(inputs)


def to_float64(tensor: ir.TensorProtocol) -> NDArray[np.float64]:
    """A tensor's values in double precision."""
    return np.asarray(tensor.numpy()).astype(np.float64)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize, without the descriptions of initializers that the graph library adds."""
    proto = ir.to_proto(model)
    stored = {t.name for t in proto.graph.initializer}
    kept = [v for v in proto.graph.value_info if v.name not in stored]
    if len(kept) != len(proto.graph.value_info):
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
    return proto


def save(model: ir.Model, path: Path) -> int:
    """Write a model to a new file and return the bytes written; external data past 2 GB.

    Raises
    ------
    OutputError
        If the file can't be written; what was begun is removed.
    """
    try:
        return _save(model, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OutputError(write_failure(path, error)) from None


def _save(model: ir.Model, path: Path) -> int:
    weights = sum(v.const_value.nbytes for g in all_graphs(model)
                  for v in g.initializers.values() if v.const_value is not None)
    if weights > PROTOBUF_LIMIT - (64 << 20):
        data = f"{path.name}.data"
        ir.save(model, path, external_data=data)
        return path.stat().st_size + (path.parent / data).stat().st_size
    blob = _serialize(to_proto(model), str(path))
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    return len(blob)


def write_failure(path: Path, error: OSError) -> str:
    """The line for an operating system error on writing."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{path}: the disk is full or the file size limit is reached; free some space"
    return f"can't write {path}: {error.strerror or error}; choose another place"


def check_destination(out: Path, source: Path | None) -> None:
    """Refuse an output path that can't work, before the long work begins.

    Raises
    ------
    UsageError
        If it is the input itself.
    OutputError
        If its folder is missing or not writable, or it is something other than a file.
    """
    if out.is_dir():
        raise OutputError(f"OUT {out} is a folder: name a file in it")
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"IN and OUT are the same file ({out}): name another OUT")
    if out.exists() and not out.is_file():
        raise OutputError(f"OUT {out} is not a regular file: name another")
    if not out.parent.is_dir():
        raise OutputError(f"OUT's folder {out.parent} doesn't exist: create it first")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OutputError(write_failure(out, error)) from None


def one_line(error: object) -> str:
    """The first informative line of an error, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder: name the .onnx file in it")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror or error}") from None
    if not data:
        raise ModelError(f"{path} is empty (0 bytes): export or copy the model again")
    return data


def _serialize(proto: onnx.ModelProto, label: str) -> bytes:
    try:
        return proto.SerializeToString(deterministic=True)
    except (ValueError, EncodeError):
        raise ModelError(
            f"{label} is past protobuf's 2 GB: save it with its weights as external data"
        ) from None


def _check_versions(proto: onnx.ModelProto, label: str) -> None:
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
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{label} has IR version {proto.ir_version}, onnx {onnx.__version__} knows up to "
            f"{onnx.IR_VERSION}: upgrade onnx"
        )


def _external_files(proto: onnx.ModelProto, path: Path | None, label: str) -> dict[str, int]:
    """Location and size of every external data file, each checked to be there in full."""
    files: dict[str, int] = {}
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
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
        if not location or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
            raise ModelError(
                f"{label}: the external data of {tensor.name!r} is at {location!r}, outside the "
                "model's folder; refused"
            )
        file = path.parent / location
        if not file.is_file():
            raise ModelError(
                f"{label}: the external data of {tensor.name!r} is missing: {file}; "
                "copy it beside the model"
            )
        size = file.stat().st_size
        end = int(entries.get("offset", 0) or 0) + int(entries.get("length", 0) or 0)
        if end > size:
            raise ModelError(
                f"{label}: {file} holds {size:,} bytes, {tensor.name!r} ends at {end:,}: "
                "it is cut short, copy it again"
            )
        files[location] = size
    return files
