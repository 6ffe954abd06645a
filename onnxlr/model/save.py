"""Models written as files, with their external data, and read back."""

import contextlib
import hashlib
import itertools
import os
import shutil
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxlr.errors import OutputError
from onnxlr.model.graph import all_graphs
from onnxlr.model.load import Source, check_unchanged
from onnxlr.model.protobuf import PROTOBUF_LIMIT, serialize, to_proto
from onnxlr.system.files import default_file_mode, write_failure

_DATA = "weights-"  # what external data made here are called, with their digest and .data
_STEM = 50  # characters of a name that are told
_OUTSIDE_FROM = 1024  # bytes; what is smaller stays in the model's own file


def save(model: ir.Model, path: Path, *, outside: bool = False) -> int:
    """Write a model to a new file and return the bytes written.

    Parameters
    ----------
    model : onnx_ir.Model
        Its tensors are those of the data file afterwards, if there is one.
    path : Path
    outside : bool
        Whether weights go into a data file beside it, one after the other, so that no more than one
        is held; past 2 GB they do in any case.

    Raises
    ------
    OutputError
        If the file can't be written; what was begun is removed.
    """
    try:
        held = [v for g in all_graphs(model) for v in g.initializers.values()]
        stored = sum(v.const_value.nbytes for v in held if v.const_value is not None)
        outside = outside or stored > PROTOBUF_LIMIT - (64 << 20)
        nbytes = _write_data(model, path.parent) if outside else 0
        return nbytes + _write(path, serialize(to_proto(model), str(path)))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OutputError(write_failure(path, error)) from None


def _write_data(model: ir.Model, folder: Path) -> int:
    """Write the weights into one file beside the model, and let the model refer to it.

    The file is named by its content: a model and the data of another never come together, whatever
    ends or runs at the same time, and the same plan gives the same bytes under any name.
    """
    for old in folder.glob(f"{_DATA}*"):  # of the build before, which is this one's to replace
        old.unlink()
    passing = folder / f"{_DATA}passing"
    ir.external_data.unload_from_model(
        model, folder, passing.name, size_threshold_bytes=_OUTSIDE_FROM
    )
    values = [v for g in all_graphs(model) for v in g.initializers.values()]
    moved = [
        (value, tensor)
        for value in values
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    ]
    if not moved:
        passing.unlink(missing_ok=True)
        return 0
    with passing.open("rb+") as file:
        os.fsync(file.fileno())
        content = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{_DATA}{content[:16]}.data"
    nbytes = passing.stat().st_size
    with contextlib.suppress(OSError):  # some disks know no permissions
        passing.chmod(default_file_mode(folder))
    passing.rename(folder / name)
    for value, tensor in moved:
        value.const_value = ir.ExternalTensor(
            name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=folder,
        )
    return nbytes


def _write(path: Path, blob: bytes) -> int:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    return len(blob)


def working_name(source: Source, out: Path | None) -> str:
    """What a model is called while it is made: after OUT, like none of its data files, ….onnx.

    Libraries tell formats by the ends of names.
    """
    stem = "model" if out is None else out.name.removesuffix(".onnx")[:_STEM]
    taken = {Path(location).parts[0] for location in source.external}
    names = (f"{stem}{'-' * i}.onnx" for i in itertools.count())
    return next(name for name in names if name not in taken)


def read_back(path: Path, *, whole: bool) -> onnx.ModelProto:
    """A model that was written.

    Its external data are read only where they won't stay: a model past 2 GB is as large in memory.
    """
    return onnx.load(path, format="protobuf", load_external_data=whole)


def copy_source(source: Source, folder: Path, name: str) -> tuple[Path, int]:
    """The original, byte for byte, with its external data."""
    path = folder / name
    try:
        for built in folder.iterdir():  # what was tried and not taken
            built.unlink()
        if source.path is None:
            return path, path.write_bytes(source.data or b"")
        shutil.copyfile(source.path, path)
        for location in source.external:
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path.parent / location, folder / location)
    except OSError as error:
        check_unchanged(source)
        raise OutputError(write_failure(path, error)) from None
    return path, source.nbytes
