"""External data files of a model: where they are, whether they are complete, and their stamps."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import onnx
from google.protobuf.message import Message

from onnxlr.errors import ModelError
from onnxlr.model.protobuf import PROTOBUF_LIMIT, all_tensors, bodies_of, messages_in, tensor_nbytes

DATA_PREFIX = "weights-"  # data files written by onnxlr are named by their digest
DATA_NAME_PATTERN = rb"weights-[0-9a-f]{16}\.data"


class FileStamp(NamedTuple):
    """What tells a file from one that takes its place: size in bytes, times in ns, inode.

    Programs that unpack archives set the time of modification; the time at which the system noted
    a change (``changed``) they can't set.
    """

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "FileStamp":
        """The stamp of a file from its ``stat``."""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def external_files(
    proto: onnx.ModelProto, path: Path | None, label: str
) -> tuple[tuple[str, FileStamp], ...]:
    """Location and stamp of every external data file that a model refers to, by location.

    Raises
    ------
    ModelError
        If one is missing, cut short, a link, or outside the model's folder.
    """
    files: dict[str, FileStamp] = {}
    for tensor in all_tensors(proto):
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
        if file.resolve() != path.parent.resolve() / location:  # "\" may be part of a name
            raise ModelError(
                f"{label}: {file} is a link to {file.resolve()}: external data must be files of "
                "their own; copy the model and its data without links (cp -L)"
            )
        stat = file.stat()
        if stat.st_nlink > 1:
            raise ModelError(
                f"{label}: {file} is a hard link, one of {stat.st_nlink} names of its file: "
                "external data must be files of their own; copy the model and its data"
            )
        end = _external_end(tensor, entries, label)
        if end > stat.st_size:
            raise ModelError(
                f"{label}: {file} holds {stat.st_size:,} bytes, {tensor.name!r} ends at {end:,}: "
                "it is cut short, copy it again"
            )
        files[location] = FileStamp.of(stat)
    return tuple(sorted(files.items()))


def read_inner(proto: onnx.ModelProto, path: Path, label: str) -> None:
    """Read external tensors of attributes, functions and training_info into the model itself.

    Initializers of the main graph and its bodies stay outside, since they may be larger than
    memory. The locations must have been checked by ``external_files``.

    Raises
    ------
    ModelError
        If they can't be read, or take more than a model's own file can hold.
    """
    inner = [t for t in _inner_tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL]
    if sum(tensor_nbytes(t) or 0 for t in inner) > PROTOBUF_LIMIT:
        raise ModelError(
            f"{label} has more than 2 GB of external data in attributes ({inner[0].name!r} is one):"
            " not supported, export its weights as initializers"
        )
    for tensor in inner:
        entries = {e.key: e.value for e in tensor.external_data}
        try:
            with (path.parent / entries["location"]).open("rb") as file:
                file.seek(int(entries.get("offset") or 0))
                tensor.raw_data = file.read(tensor_nbytes(tensor) or 0)
        except OSError as error:
            raise ModelError(f"can't read the weight {tensor.name!r}: {error}") from None
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _inner_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors except the initializers of the main graph and of the bodies in it."""
    inner: list[Message] = [*proto.functions, *proto.training_info]
    graphs = [proto.graph]
    while graphs:
        for node in graphs.pop().node:
            graphs += bodies_of(node)
            inner += [a for a in node.attribute if not (a.HasField("g") or a.graphs)]
    return (m for m in messages_in(*inner) if isinstance(m, onnx.TensorProto))


def _external_end(tensor: onnx.TensorProto, entries: Mapping[str, str], label: str) -> int:
    """Offset in its file of a tensor's end, in bytes."""
    numbers = {"offset": 0, "length": tensor_nbytes(tensor) or 0}
    for key in numbers:
        text = entries.get(key, "")
        if text:
            if not re.fullmatch(r"[0-9]{1,18}", text):
                raise ModelError(
                    f"{label}: the external data of {tensor.name!r} has {key} {text[:80]!r}, which "
                    "is no number of bytes"
                )
            numbers[key] = int(text)
    needed = tensor_nbytes(tensor) or 0
    if numbers["length"] < needed:
        raise ModelError(
            f"{label}: the external data of {tensor.name!r} has length {numbers['length']:,}, its "
            f"shape {list(tensor.dims)} needs {needed:,}: export the model again"
        )
    return numbers["offset"] + numbers["length"]
