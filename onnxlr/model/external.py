"""External data files of a model: where they are, what they hold, and when they were written."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import onnx
from google.protobuf.message import Message

from onnxlr.errors import ModelError
from onnxlr.model.protobuf import PROTOBUF_LIMIT, all_tensors, bodies_of, messages_in, tensor_nbytes


class FileStamp(NamedTuple):
    """What tells a file from the one that takes its place.

    Archives set the times of what they unpack; when the system took note of a change they can't.
    """

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, about: os.stat_result) -> "FileStamp":
        """Of what the system says of a file."""
        return cls(about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)


def external_files(
    proto: onnx.ModelProto, path: Path | None, label: str
) -> tuple[tuple[str, FileStamp], ...]:
    """Location of every external data file, each there in full, and how it was found."""
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
        if file.resolve() != path.parent.resolve() / location:  # in it \ may be a letter
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
        end = _external_end(tensor, entries, label)
        if end > about.st_size:
            raise ModelError(
                f"{label}: {file} holds {about.st_size:,} bytes, {tensor.name!r} ends at {end:,}: "
                "it is cut short, copy it again"
            )
        files[location] = FileStamp.of(about)
    return tuple(sorted(files.items()))


def read_inner(proto: onnx.ModelProto, path: Path, label: str) -> None:
    """Read what attributes, functions and training keep in external data; ``external_files`` first.

    What stays outside are the initializers of the main graph and its bodies: they are what may be
    larger than memory. The others are part of the model's own text, and written with it.

    Raises
    ------
    ModelError
        If they can't be read, or a model's own file couldn't hold them.
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
    """All but the initializers of the main graph and of the bodies in it."""
    inner: list[Message] = [*proto.functions, *proto.training_info]
    graphs = [proto.graph]
    while graphs:
        for node in graphs.pop().node:
            graphs += bodies_of(node)
            inner += [a for a in node.attribute if not (a.HasField("g") or a.graphs)]
    return (m for m in messages_in(*inner) if isinstance(m, onnx.TensorProto))


def _external_end(tensor: onnx.TensorProto, entries: Mapping[str, str], label: str) -> int:
    """Where in its file a tensor ends."""
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
