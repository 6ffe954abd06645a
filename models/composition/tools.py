"""What composition is tried with: two quantizers, a converter to half precision, a simplifier."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import version_converter

from models.zoo.models import ZooError

Arrays = dict[str, NDArray[Any]]

CALIBRATION = 32  # samples that the static quantizer sees
_PER_CHANNEL = 13  # the first opset whose DequantizeLinear has an axis
_HEAVY = ("Conv", "ConvTranspose", "Gather", "Gemm", "MatMul")
# What onnxslim needs beside what onnxlr and ONNX Runtime bring; no version but this was tried.
_SLIM = ("onnxslim==0.1.98", "colorama==0.4.6", "sympy==1.14.0", "mpmath==1.3.0")


@dataclass(frozen=True)
class Tool:
    """A tool that rewrites a model.

    Attributes
    ----------
    name : str
        In file names.
    title : str
        In the table.
    apply : callable
        ``(source, out, samples, work)``: writes a file, raises whatever the tool raises.
    """

    name: str
    title: str
    apply: Callable[[Path, Path, Arrays, Path], None]


def _preprocess(source: Path, out: Path) -> onnx.ModelProto:
    """Prepare a model as ONNX Runtime advises, and remove what its quantizers fail on.

    Symbolic shape inference is left out: it gives up on three of four models ("Incomplete symbolic
    shape inference"). Per-channel scales need opset 13. Shapes that a file states of its weights
    are dropped: the quantizer transposes weights of Gemm, and then refuses what was stated.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = out.with_suffix(".ready")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    model = onnx.load(ready)
    ready.unlink()
    version = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if version < _PER_CHANNEL:
        model = version_converter.convert_version(model, _PER_CHANNEL)
    stored = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.value_info if value.name not in stored]
    del model.graph.value_info[:]
    model.graph.value_info.extend(values)
    return model


def _dynamic(source: Path, out: Path, _: Arrays, __: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(_preprocess(source, out), out, per_channel=True)


def _static(source: Path, out: Path, samples: Arrays, _: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            count = min(CALIBRATION, len(next(iter(samples.values()))))
            self._left = iter(range(count))

        def get_next(self) -> Arrays | None:
            i = next(self._left, None)
            return None if i is None else {name: a[i : i + 1] for name, a in samples.items()}

    # Only what holds weights: between them, an attention mask of -3e38 would set the scales.
    model = _preprocess(source, out)
    quantize_static(model, out, Reader(), per_channel=True, op_types_to_quantize=list(_HEAVY))


def _half(source: Path, out: Path, _: Arrays, __: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    # It appends the casts of the inputs behind all nodes, which the checker refuses.
    OnnxModel.graph_topological_sort(model.graph)
    onnx.save(model, out)


def _slim(source: Path, out: Path, _: Arrays, work: Path) -> None:
    _install(work / "tools")
    onnxslim = importlib.import_module("onnxslim")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
        onnxslim.slim(str(source), str(out))


def _install(folder: Path) -> None:
    """Make onnxslim importable: from where it is installed, else from ``folder``.

    Raises
    ------
    ZooError
        If it can't be had.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: what is installed goes first
    with contextlib.suppress(ImportError):
        for name in ("colorama", "onnxslim"):
            importlib.import_module(name)
        return
    if (folder / "onnxslim").is_dir():
        raise ZooError(f"onnxslim in {folder} can't be imported: remove that folder")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run(  # noqa: S603 - the names and versions are those of this file
        [*pip, *_SLIM], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "pip says nothing").splitlines()[-1]
        raise ZooError(f"pip can't install {_SLIM[0]}: {last}; pip install onnxslim yourself")
    importlib.invalidate_caches()
    _install(folder)


TOOLS = (
    Tool("dynamic", "dynamic INT8", _dynamic),
    Tool("static", "static INT8 (QDQ)", _static),
    Tool("half", "float16", _half),
    Tool("slim", "onnxslim", _slim),
)


def read_samples(path: Path, names: list[str]) -> Arrays:
    """Return the inputs of a model among the arrays of an ``.npz`` file."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in names}
