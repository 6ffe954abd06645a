"""Writes models as files, with their external data, and reads them back."""

import contextlib
import hashlib
import itertools
import os
import shutil
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxlr.errors import OutputError
from onnxlr.model.external import DATA_PREFIX
from onnxlr.model.graph import all_graphs
from onnxlr.model.load import Source, check_unchanged
from onnxlr.model.protobuf import PROTOBUF_LIMIT, serialize, to_proto
from onnxlr.system.files import default_file_mode, write_failure

_STEM_LENGTH = 50  # characters of OUT's name that the working name takes over
_OUTSIDE_FROM = 1024  # bytes of a tensor; smaller ones stay in the model's own file
_INSIDE_LIMIT = PROTOBUF_LIMIT - (64 << 20)  # bytes of weights; the rest is for nodes


def save(
    model: ir.Model, path: Path, *, outside: bool = False, inside_limit: int = _INSIDE_LIMIT
) -> int:
    """Write a model to a new file and return the bytes written.

    Parameters
    ----------
    model : onnx_ir.Model
        If a data file is written, its tensors are those of that file afterwards.
    path : Path
    outside : bool
        Whether weights go into a data file beside the model, one after the other, so that only one
        at a time is in memory.
    inside_limit : int
        Bytes of weights beyond which they go there in any case.

    Raises
    ------
    OutputError
        If the file can't be written; an incomplete one is removed.
    """
    try:
        values = [v for g in all_graphs(model) for v in g.initializers.values()]
        size = sum(v.const_value.nbytes for v in values if v.const_value is not None)
        nbytes = _write_data(model, path.parent) if outside or size > inside_limit else 0
        return nbytes + _write(path, serialize(to_proto(model), str(path)))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OutputError(write_failure(path, error)) from None


def _write_data(model: ir.Model, folder: Path) -> int:
    """Write the weights into one file in the folder, make the model refer to it; returns its bytes.

    The file is named by a digest of its content. So a model never meets the data of another,
    whatever ends or runs at the same time, and the same plan gives the same bytes under any name.
    """
    for old in folder.glob(f"{DATA_PREFIX}*"):  # of the previous model in this folder
        old.unlink()
    draft = folder / f"{DATA_PREFIX}passing"
    ir.external_data.unload_from_model(
        model, folder, draft.name, size_threshold_bytes=_OUTSIDE_FROM
    )
    values = [v for g in all_graphs(model) for v in g.initializers.values()]
    moved = [
        (value, tensor)
        for value in values
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    ]
    if not moved:
        draft.unlink(missing_ok=True)
        return 0
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{DATA_PREFIX}{digest[:16]}.data"
    nbytes = draft.stat().st_size
    with contextlib.suppress(OSError):  # some disks have no permissions
        draft.chmod(default_file_mode(folder))
    draft.rename(folder / name)
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


def _write(path: Path, content: bytes) -> int:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content)


def working_name(source: Source, out: Path | None) -> str:
    """The file name of a model until it is moved to OUT: like OUT's, and unlike its data files'.

    It ends in .onnx, since libraries tell formats by the end of a name.
    """
    stem = "model" if out is None else out.name.removesuffix(".onnx")[:_STEM_LENGTH]
    data_names = {Path(location).parts[0] for location in source.external}
    names = (f"{stem}{'-' * i}.onnx" for i in itertools.count())
    return next(name for name in names if name not in data_names)


def read_back(path: Path, *, whole: bool) -> onnx.ModelProto:
    """Read a written model, and its external data too if ``whole``.

    That is needed only where the data files don't stay: the data of a large model fill memory.
    """
    return onnx.load(path, format="protobuf", load_external_data=whole)


def copy_source(source: Source, folder: Path, name: str) -> tuple[Path, int]:
    """Copy the original, byte for byte, with its external data, to a folder that is emptied first.

    Returns
    -------
    The path of the copy, and its bytes with those of external data.

    Raises
    ------
    ModelError
        If the original changed since it was read.
    OutputError
        If it can't be copied.
    """
    path = folder / name
    try:
        for entry in folder.iterdir():  # models that were built and not chosen
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
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
