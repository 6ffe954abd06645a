"""Steps that are ready-made, on ONNX Runtime's own tools: INT8 quantization and half precision.

Each is given the path of a model and writes another beside it. What the tools print and log is
dropped.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxlr.system.session import Feed

Feeds = Callable[[], Iterable[Feed]]

_PER_CHANNEL = 13  # the first opset whose DequantizeLinear has an axis
_PROTOBUF_BYTES = 3 << 29  # beyond which weights are kept outside: a file may have 2 GB
# What holds weights. Between them an attention mask of -3e38 would set the scales.
_HEAVY = ("Conv", "ConvTranspose", "Gather", "Gemm", "MatMul")


@dataclass(frozen=True)
class Ready:
    """A ready-made step: how it is done, and whether it has to see samples."""

    calibrates: bool
    make: Callable[[Path, Feeds], Path]


def _quietly(make: Callable[[Path, Feeds], Path]) -> Callable[[Path, Feeds], Path]:
    """The same without a word."""

    def quiet(path: Path, feeds: Feeds) -> Path:
        before = logging.root.manager.disable
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            try:
                return make(path, feeds)
            finally:
                logging.disable(before)

    return quiet


def int8_dynamic(path: Path, _: Feeds) -> Path:
    """Weights in INT8, one scale a channel; scales of what they meet are found in each run.

    Weights have seven bits: processors without VNNI saturate where products of eight are summed.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large, out = _is_large(path), _beside(path, "int8")
    model = _prepared(path, large)
    # Older runtimes have no product of convolutions with signed weights.
    convolves = any(node.op_type == "Conv" for node in model.graph.node)
    quantize_dynamic(
        model,
        out,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QUInt8 if convolves else QuantType.QInt8,
        use_external_data_format=large,
    )
    return out


def int8_static(path: Path, feeds: Feeds) -> Path:
    """Weights and what they meet in INT8, with the scales that samples show; QDQ nodes.

    Weights have seven bits, as in ``int8_dynamic``.
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, rest: Iterator[Feed]) -> None:
            self._rest = rest

        def get_next(self) -> dict[str, Any] | None:
            feed = next(self._rest, None)
            return None if feed is None else dict(feed)

    large, out = _is_large(path), _beside(path, "int8")
    model = _prepared(path, large)
    quantize_static(
        model,
        out,
        Reader(iter(feeds())),
        per_channel=True,
        reduce_range=True,
        op_types_to_quantize=list(_HEAVY),
        use_external_data_format=large,
    )
    return out


def half_precision(path: Path, _: Feeds) -> Path:
    """Weights and arithmetic in float16; inputs and outputs keep their types."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    large, out = _is_large(path), _beside(path, "fp16")
    model = convert_float_to_float16(onnx.load(path), keep_io_types=True, disable_shape_infer=large)
    # It appends the casts of the inputs behind all nodes, which the checker refuses.
    OnnxModel.graph_topological_sort(model.graph)
    onnx.save(model, out, save_as_external_data=large, location=f"{out.name}.data")
    return out


def _prepared(path: Path, large: bool) -> onnx.ModelProto:
    """A model prepared as ONNX Runtime advises, without what its quantizers fail on.

    Symbolic shape inference is left out: it gives up on three of four models ("Incomplete symbolic
    shape inference"). Per-channel scales need opset 13. Shapes that a file states of its weights
    are dropped: the quantizer transposes weights of Gemm, and then refuses what was stated.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not large:  # in one file: weights that are outside aren't found where it prepares them
        whole = _beside(path, "whole")
        onnx.save(onnx.load(path), whole)
        path = whole
    ready = _beside(path, "ready")
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True, save_as_external_data=large)
    model = onnx.load(ready)
    version = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if version < _PER_CHANNEL:
        model = onnx.version_converter.convert_version(model, _PER_CHANNEL)
    stored = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.value_info if value.name not in stored]
    del model.graph.value_info[:]
    model.graph.value_info.extend(values)
    return model


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.stem}.{word}.onnx")


def _is_large(path: Path) -> bool:
    """Whether a model and its data may not fit into one file."""
    return sum(p.stat().st_size for p in path.parent.iterdir()) > _PROTOBUF_BYTES


READY = {
    "int8-dynamic": Ready(False, _quietly(int8_dynamic)),
    "int8-static": Ready(True, _quietly(int8_static)),
    "fp16": Ready(False, _quietly(half_precision)),
}
