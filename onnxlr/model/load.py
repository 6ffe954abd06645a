"""Reads a model: checks it, and computes the digest of all that it holds."""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxlr.errors import ModelError, UsageError, one_line
from onnxlr.model.checks import check_attributes, check_tensors, check_text, check_versions
from onnxlr.model.external import FileStamp, external_files, read_inner
from onnxlr.model.foreign import as_message
from onnxlr.model.graph import all_graphs
from onnxlr.model.protobuf import OTHER_TYPE, TRAINING_INFO, serialize, set_aside_types
from onnxlr.model.topology import check_topology

# Location and stamp of each external data file, by location.
Model = Any  # a path, bytes, a ModelProto, a Source, or a model that as_message knows
DataStamps = tuple[tuple[str, FileStamp], ...]


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
        The file it was read from, if it was.
    digest : str
        SHA-256 of the serialized model and of its external data.
    nbytes : int
        Size in bytes, external data included.
    external : tuple of str
        Locations of external data files, relative to the model's folder.
    data_stamps : tuple of (str, FileStamp)
        Their locations and stamps when the digest was computed.
    data : bytes or None
        The serialized model, if it wasn't read from a file.
    file_stamp : FileStamp or None
        The stamp of the model's file when that was read.
    """

    model: ir.Model
    label: str
    path: Path | None
    digest: str
    nbytes: int
    external: tuple[str, ...] = ()
    data_stamps: DataStamps = ()
    data: bytes | None = None
    file_stamp: FileStamp | None = None

    @property
    def folder(self) -> str | None:
        """The folder of its external data; None where it has none."""
        if self.path is None or not self.external:
            return None
        return str(self.path.parent.absolute())


def load(
    model: Model,
    *,
    cached_digest: tuple[str, DataStamps] | None = None,
) -> Source:
    """Read a model from a path, from bytes or from a ``ModelProto``, and check it.

    Weights in external data stay on disk until they are used.

    Parameters
    ----------
    model : path, bytes, ModelProto, another library's model or Source
        ``as_message`` says which others; a Source is returned as it is.
    cached_digest : (str, DataStamps), optional
        The digest of this very model, computed when its external data had these stamps. While they
        have them still, the data needn't be read for the digest.

    Raises
    ------
    ModelError
        If it isn't a readable ONNX model of opset 7 to the newest this ``onnx`` knows, or its
        external data is missing, short or outside its folder.
    """
    if isinstance(model, Source):
        return model
    model = as_message(model)
    path, file_stamp = None, None
    if isinstance(model, onnx.ModelProto):
        label, data = "<model>", serialize(model, "<model>")
    elif isinstance(model, bytes):
        label, data = "<model>", model
    elif not isinstance(model, (str, os.PathLike)):
        raise UsageError(
            f"a model of type {type(model).__name__} can't be read: give a path, bytes, a "
            "ModelProto, an onnx_ir.Model, an onnx_graphsurgeon.Graph or a torch ONNXProgram"
        )
    else:
        path = Path(model)
        check_name(path)
        file_stamp = _stamp_of(path)
        label, data = str(path), _read(path)
    proto = _parse(data, label)
    check_versions(proto, label)
    check_text(proto, label)
    check_tensors(proto, label)
    check_attributes(proto, label)
    stamps = external_files(proto, path, label)
    if path is not None and stamps:
        read_inner(proto, path, label)
    if cached_digest is not None and stamps and cached_digest[1] == stamps:
        digest = cached_digest[0]
    else:
        digest = _digest_of(data, path, stamps)
    nbytes = len(data) + sum(stamp.size for _, stamp in stamps)
    original = data if path is None else None
    del data  # the memory is needed: the graph takes as much again
    graph_model = _build_graph(proto, label)
    if path is not None:
        for graph in all_graphs(graph_model):
            ir.external_data.set_base_dir(graph, path.parent)
    locations = tuple(location for location, _ in stamps)
    return Source(graph_model, label, path, digest, nbytes, locations, stamps, original, file_stamp)


def _parse(data: bytes, label: str) -> onnx.ModelProto:
    """Parse a serialized model.

    That makes a copy of a ``ModelProto`` too, which is needed: onnx-ir keeps the messages it gets,
    and changes names in them.
    """
    if data[4:8] == b"ORTM":
        raise ModelError(
            f"{label} is in ONNX Runtime's own format (.ort), which nothing else reads: give the "
            ".onnx file that it was made of"
        )
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"{label} ({len(data):,} bytes) is not an ONNX model, or is cut short: "
            "export or copy it again"
        ) from None
    return proto


def _build_graph(proto: onnx.ModelProto, label: str) -> ir.Model:
    """The model as a graph of onnx-ir, its connections checked."""
    others = set_aside_types(proto.graph)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx-ir raises whatever the malformed part leads to
        cause: BaseException = error
        while cause.__cause__ is not None:  # it wraps the reason in errors that say where it was
            cause = cause.__cause__
        if isinstance(cause, NotImplementedError):  # for maps within a body, say
            reason = one_line(cause).split(". Please")[0]
            raise ModelError(
                f"{label} can't be read by onnx-ir {ir.__version__}: {reason}"
            ) from None
        raise ModelError(f"{label} is malformed: {one_line(cause)}") from None
    check_topology(model, label)
    # onnx-ir has no place for it; ``to_proto`` puts it back.
    model.graph.meta[TRAINING_INFO] = list(proto.training_info)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in others:
            value.meta[OTHER_TYPE] = others[value.name]
    return model


def check_name(path: Path) -> None:
    """Refuse a path that ONNX Runtime can't open.

    Raises
    ------
    ModelError
        If it isn't UTF-8, or contains a NUL.
    """
    if "\0" in str(path):
        raise ModelError(
            f"the path {str(path)!r} holds a NUL, which no file system allows: name another"
        )
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(
            f"the path {path} isn't text in UTF-8, and ONNX Runtime takes no other: rename it"
        ) from None


def check_unchanged(source: Source) -> None:
    """Refuse to write a result if the model's files have changed since they were read.

    Weights stay on disk until they are used, and a training program may save again at any time.

    Raises
    ------
    ModelError
        If its file or its external data has another content now.
    """
    if source.path is None:
        return
    files = [source.path.parent / location for location in source.external]
    stamps = [_stamp_of(source.path), *map(_stamp_of, files)]
    if stamps == [source.file_stamp, *(stamp for _, stamp in source.data_stamps)]:
        return
    with contextlib.suppress(ModelError):
        if load(source.path).digest == source.digest:  # written again with the same content
            return
    raise ModelError(
        f"{source.label} or its external data changed while they were being worked on; nothing was "
        "written: run again when they stay as they are"
    )


def _stamp_of(path: Path) -> FileStamp | None:
    """The stamp of a file; None if there is no such file."""
    try:
        return FileStamp.of(path.stat())
    except OSError:
        return None


def _digest_of(data: bytes, path: Path | None, stamps: DataStamps) -> str:
    """The digest of a serialized model and its external data, which are read in pieces."""
    digest = hashlib.sha256(data)
    for location, stamp in stamps:
        assert path is not None
        digest.update(f"{location}:{stamp.size}".encode())
        try:
            with (path.parent / location).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(f"can't read {path.parent / location}: {error.strerror}") from None
    return digest.hexdigest()


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
