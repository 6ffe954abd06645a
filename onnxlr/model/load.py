"""A model as the user gave it: read, checked, with the digest of all that it holds."""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxlr.errors import ModelError, one_line
from onnxlr.model.checks import (
    check_attributes,
    check_tensors,
    check_text,
    check_versions,
)
from onnxlr.model.external import FileStamp, external_files, read_inner
from onnxlr.model.graph import all_graphs
from onnxlr.model.protobuf import TRAINING_INFO, serialize
from onnxlr.model.topology import check_topology

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
        Where it came from, when it came from a file.
    digest : str
        SHA-256 of the serialized model and of its external data.
    nbytes : int
        Size in bytes, external data included.
    external : tuple of str
        Locations of external data files, relative to the model's folder.
    data_stamps : tuple of (str, FileStamp)
        Location, bytes and time of change of each of them, when its digest was taken.
    data : bytes or None
        The serialized model, when it came from memory.
    file_stamp : FileStamp or None
        Its own file, as it was when that was read.
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
        """Where its external data lie; None where it has none."""
        if self.path is None or not self.external:
            return None
        return str(self.path.parent.absolute())


def load(
    model: "str | os.PathLike[str] | bytes | onnx.ModelProto | Source",
    *,
    cached_digest: tuple[str, DataStamps] | None = None,
) -> Source:
    """Read a model from a path, from bytes or from a ``ModelProto``.

    Weights in external data stay on disk until they are used.

    Parameters
    ----------
    model : path, bytes or ModelProto
        Or what has been read already, which is given back.
    cached_digest : (str, DataStamps), optional
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
    if cached_digest is not None and external and cached_digest[1] == external:
        told = cached_digest[0]
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
    check_topology(built, label)
    # The graph library has no room for it; `to_proto` puts it back.
    built.graph.meta[TRAINING_INFO] = list(proto.training_info)
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
    if found == [source.file_stamp, *(written for _, written in source.data_stamps)]:
        return
    with contextlib.suppress(ModelError):
        if load(source.path).digest == source.digest:  # touched, or written again as it was
            return
    raise ModelError(
        f"{source.label} or its external data changed while they were being worked on; nothing was "
        "written: run again when they stay as they are"
    )


def _written(path: Path) -> FileStamp | None:
    """How a file is found; None where there is none."""
    try:
        return FileStamp.of(path.stat())
    except OSError:
        return None


def _digest_with(digest: Any, path: Path | None, external: DataStamps) -> str:
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
