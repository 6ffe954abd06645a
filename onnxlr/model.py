"""Reading, preparing, counting and writing ONNX models."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray

from onnxlr.errors import ModelError, one_line
from onnxlr.sanity import (
    OLDEST_OPSET,
    ONNX_DOMAINS,
    Written,
    check_attributes,
    check_tensors,
    check_text,
    check_versions,
    external_files,
    read_inner,
)
from onnxlr.wiring import check_wiring

DEFAULTS = 4  # IR version from which on a constant that is an input may be given another value
_TRAINING = "onnxlr_training_info"
# What the graph library has to say of a broken model is told once, by the error.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())


Stamp = tuple[tuple[str, Written], ...]


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
        SHA-256 of the serialized model and of its external data.
    nbytes : int
        Size in bytes, external data included.
    external : tuple of str
        Locations of external data files, relative to the model's folder.
    stamp : tuple of (str, Written)
        Location, bytes and time of change of each of them, when its digest was taken.
    data : bytes or None
        The serialized model, when it came from memory.
    written : Written or None
        Its own file, as it was when that was read.
    """

    model: ir.Model
    label: str
    path: Path | None
    digest: str
    nbytes: int
    external: tuple[str, ...] = ()
    stamp: Stamp = ()
    data: bytes | None = None
    written: Written | None = None

    @property
    def folder(self) -> str | None:
        """Where its external data lie; None where it has none."""
        if self.path is None or not self.external:
            return None
        return str(self.path.parent.absolute())


def load(
    model: "str | os.PathLike[str] | bytes | onnx.ModelProto | Source",
    *,
    known: tuple[str, Stamp] | None = None,
) -> Source:
    """Read a model from a path, from bytes or from a ``ModelProto``.

    Weights in external data stay on disk until they are used.

    Parameters
    ----------
    model : path, bytes or ModelProto
        Or what has been read already, which is given back.
    known : (str, Stamp), optional
        The digest that it has as long as its external data carry this stamp: they needn't be read
        for it then.

    Raises
    ------
    ModelError
        If it isn't a readable ONNX model of opset 7 to the newest this ``onnx`` knows, or its
        external data is missing, short or outside its folder.
    """
    if isinstance(model, Source):
        return model
    path, written = None, None
    if isinstance(model, onnx.ModelProto):
        label, data = "<model>", serialize(model, "<model>")
    elif isinstance(model, bytes):
        label, data = "<model>", model
    else:
        path = Path(model)
        check_name(path)
        written = _written(path)
        label, data = str(path), _read(path)
    # Also of a ModelProto a copy: the graph library wraps what it is given, and changes names.
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"{label} ({len(data):,} bytes) is not an ONNX model, or is cut short: "
            "export or copy it again"
        ) from None
    check_versions(proto, label)
    check_text(proto, label)
    check_tensors(proto, label)
    check_attributes(proto, label)
    external = external_files(proto, path, label)
    digest = hashlib.sha256(data)
    if path is not None and external:
        read_inner(proto, path, label)
    nbytes = len(data) + sum(found.size for _, found in external)
    original = data if path is None else None
    del data
    if known is not None and external and known[1] == external:
        told = known[0]
    else:
        told = _digest_with(digest, path, external)
    try:
        built = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises whatever the malformed part trips over
        cause: BaseException = error
        while cause.__cause__ is not None:  # it wraps the reason in where it happened
            cause = cause.__cause__
        if isinstance(cause, NotImplementedError):  # maps, say, which classical models end on
            what = one_line(cause).split(". Please")[0]
            raise ModelError(f"{label} can't be read by onnx-ir {ir.__version__}: {what}") from None
        raise ModelError(f"{label} is malformed: {one_line(cause)}") from None
    check_wiring(built, label)
    # The graph library has no room for it; `to_proto` puts it back.
    built.graph.meta[_TRAINING] = list(proto.training_info)
    if path is not None:
        for graph in all_graphs(built):
            ir.external_data.set_base_dir(graph, path.parent)
    locations = tuple(location for location, _ in external)
    return Source(built, label, path, told, nbytes, locations, external, original, written)


def check_name(path: Path) -> None:
    """Refuse a path that ONNX Runtime can't be given.

    Raises
    ------
    ModelError
        If it isn't UTF-8, or has a NUL within.
    """
    if "\0" in str(path):
        raise ModelError(
            f"the path {str(path)!r} has a NUL within, which no disk takes: name another"
        )
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(
            f"the path {path} isn't text in UTF-8, and ONNX Runtime takes no other: rename it"
        ) from None


def check_unchanged(source: Source) -> None:
    """Refuse to hand over what was made of a model that is another by now.

    Its weights stay on disk until they are used, and whoever trains may save again at any time.

    Raises
    ------
    ModelError
        If its file or its external data changed since they were read.
    """
    if source.path is None:
        return
    files = [source.path.parent / location for location in source.external]
    found = [_written(source.path), *map(_written, files)]
    if found == [source.written, *(written for _, written in source.stamp)]:
        return
    with contextlib.suppress(ModelError):
        if load(source.path).digest == source.digest:  # touched, or written again as it was
            return
    raise ModelError(
        f"{source.label} or its external data changed while they were being worked on; nothing was "
        "written: run again when they stay as they are"
    )


def _written(path: Path) -> Written | None:
    """How a file is found; None where there is none."""
    try:
        return Written.of(path.stat())
    except OSError:
        return None


def _digest_with(digest: Any, path: Path | None, external: Stamp) -> str:
    """The digest of a model and its external data, which pass through in pieces."""
    for location, written in external:
        assert path is not None
        digest.update(f"{location}:{written.size}".encode())
        try:
            with (path.parent / location).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(f"can't read {path.parent / location}: {error.strerror}") from None
    return str(digest.hexdigest())


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
    tensor = node.attributes.get("value")
    if tensor is not None and not tensor.is_ref():
        return tensor.as_tensor()  # the library's own way would give it the output's name
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


def auto_pad(node: ir.Node) -> str:
    """How a convolution is padded; an empty word is none, as ONNX Runtime has it."""
    return str_attr(node, "auto_pad", "") or "NOTSET"


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


@dataclass(frozen=True, eq=False)
class Filed:
    """An array in a file, read when it is asked for."""

    path: Path
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    def array(self) -> NDArray[np.generic]:
        """What the file holds."""
        return np.fromfile(self.path, np.uint8).view(self.dtype).reshape(self.shape)


def add_initializer(
    graph: ir.Graph,
    name: str,
    array: NDArray[np.generic] | Filed,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Register a new initializer, stored as ``dtype`` (by default the array's own type).

    One in a file stays there until the model is written.
    """
    stored = dtype or ir.DataType.from_numpy(array.dtype)
    tensor: ir.TensorProtocol
    if isinstance(array, Filed):
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(array.array(), dtype=stored),
            dtype=stored,
            shape=ir.Shape(array.shape),
            name=name,
        )
    else:
        with np.errstate(over="ignore"):  # factors of what is near the largest number may pass it
            values = np.ascontiguousarray(array, dtype=stored.numpy())
        tensor = ir.Tensor(values, dtype=stored, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(stored), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def carry_over(old: ir.Value, new: ir.Value) -> None:
    """Keep what a value carries besides its name, type and shape."""
    new.meta.update(old.meta)
    new.metadata_props.update(old.metadata_props)
    new.doc_string = old.doc_string


def remove_unused(values: Sequence[ir.Value]) -> None:
    """Drop the initializers and nodes among these values' sources that nothing uses any more."""
    queue = list(values)
    while queue:
        value = queue.pop()
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is None:
            graph = value.graph
            if isinstance(graph, ir.Graph) and value.name in graph.initializers:
                graph.initializers.pop(value.name or "")
                if value in graph.inputs:  # an initializer declared as an input as well
                    graph.inputs.remove(value)
        elif node.graph is not None and not any(v.uses() for v in node.outputs):
            queue += [v for v in node.inputs if v is not None]
            node.graph.remove(node, safe=True)


def values_of(tensor: ir.TensorProtocol) -> NDArray[np.generic]:
    """A tensor's values; those of external data are read, and their file is let go of."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy())
    try:
        return np.array(tensor.numpy())
    except (OSError, ValueError) as error:  # it went, or was cut short, since it was checked
        raise ModelError(f"can't read the weight {tensor.name!r}: {one_line(error)}") from None
    finally:
        with contextlib.suppress(BufferError):  # still looked at elsewhere
            tensor.release()


def to_float64(tensor: ir.TensorProtocol) -> NDArray[np.float64]:
    """A tensor's values in double precision."""
    with np.errstate(invalid="ignore"):  # NaN of any kind stays NaN
        return values_of(tensor).astype(np.float64)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize, with what the graph library can't hold and without what it adds.

    It adds descriptions of initializers to ``value_info``, and has no place for training
    information.
    """
    proto = ir.to_proto(model)
    proto.training_info.extend(model.graph.meta.get(_TRAINING, ()))
    stored = {t.name for t in proto.graph.initializer}
    kept = [v for v in proto.graph.value_info if v.name not in stored]
    if len(kept) != len(proto.graph.value_info):
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
    return proto


def serialize(proto: onnx.ModelProto, label: str) -> bytes:
    """Deterministic bytes of a model; ``ModelError`` past protobuf's 2 GB."""
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (ValueError, EncodeError):
        raise ModelError(
            f"{label} is past protobuf's 2 GB: save it with its weights as external data"
        ) from None


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder: name the .onnx file in it")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a regular file: name the .onnx file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror or error}") from None
    if not data:
        raise ModelError(f"{path} is empty (0 bytes): export or copy the model again")
    return data
