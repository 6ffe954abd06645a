"""Quantizers and a converter of ONNX Runtime, behind onnxlr and before it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16

import onnxlr
from onnxlr.layers.layer import Layer
from tests.support.builders import Array, layers_of, low_rank, make_model, node, relative

RNG = np.random.default_rng(0)
X = (2, 16, 8, 8)
# An INT8 step is 0.8% of the largest value, some 3 deviations: 0.7% of noise for each layer.
INT8, HALF = 0.03, 1e-3

Apply = Callable[[Path, Path], None]


class Samples(CalibrationDataReader):
    """A few draws from the distribution that the tests judge on."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._left = iter([rng.standard_normal(X).astype(np.float32) for _ in range(8)])

    def get_next(self) -> dict[str, Array] | None:
        x = next(self._left, None)
        return None if x is None else {"x": x}


def dynamic(source: Path, out: Path) -> None:
    # Unsigned: the oldest runtimes have no product of convolutions with signed weights.
    quantize_dynamic(source, out, per_channel=True, weight_type=QuantType.QUInt8)


def static(source: Path, out: Path) -> None:
    # Seven bits: processors without VNNI saturate where products of eight bits each are summed.
    quantize_static(source, out, Samples(), per_channel=True, reduce_range=True)


def half(source: Path, out: Path) -> None:
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), out)


def network() -> onnx.ModelProto:
    """A conv with the channels of rank 4, a Gemm and a product of rank 4."""
    kernel = low_rank(RNG, 24, 16 * 9, 4).reshape(24, 16, 3, 3) / 12
    return make_model(
        [
            node("Conv", ["x", "k", "kb"], "c", "conv", pads=[1, 1, 1, 1]),
            node("Relu", ["c"], "r"),
            node("GlobalAveragePool", ["r"], "p"),
            node("Flatten", ["p"], "f"),
            node("Gemm", ["f", "g", "gb"], "h", "gemm", transB=1),
            node("MatMul", ["h", "m"], "y", "product"),
        ],
        {"x": X},
        ["y"],
        {
            "k": kernel.astype(np.float32),
            "kb": (RNG.standard_normal(24) / 9).astype(np.float32),
            "g": low_rank(RNG, 32, 24, 4),
            "gb": RNG.standard_normal(32).astype(np.float32),
            "m": low_rank(RNG, 32, 20, 4),
        },
    )


def outputs(path: Path) -> Array:
    """The outputs in ONNX Runtime, as users run it, on inputs that no calibration used."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal(X).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


def layers_in(path: Path) -> tuple[Layer, ...]:
    return layers_of(onnx.load(path))[2]


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    return path


@pytest.mark.parametrize(("apply", "tolerance"), [(dynamic, INT8), (static, INT8), (half, HALF)])
def test_a_tool_behind_onnxlr_treats_every_factor(
    tmp_path: Path, apply: Apply, tolerance: float
) -> None:
    source, small, out = saved(tmp_path), tmp_path / "small.onnx", tmp_path / "out.onnx"
    result = onnxlr.optimize(source, small, rank="exact", verify="none")
    assert [d.rank for d in result.plan.decisions] == [(4,)] * 3
    apply(small, out)
    layers = layers_in(out)
    assert len(layers) == 6
    if apply is half:
        assert {layer.dtype.name for layer in layers} == {"FLOAT16"}
    else:
        assert all("quantized" in (layer.weight_refusal or "") for layer in layers)
    assert relative(outputs(source), outputs(out)) < tolerance


@pytest.mark.parametrize("apply", [dynamic, static])
def test_what_is_quantized_before_is_left_alone(tmp_path: Path, apply: Apply) -> None:
    source, quantized, out = saved(tmp_path), tmp_path / "int8.onnx", tmp_path / "out.onnx"
    apply(source, quantized)
    result = onnxlr.optimize(quantized, out, rank="exact", verify="none", expand_at_load=True)
    assert [d.decision for d in result.plan.decisions] == ["keep"] * 3
    assert all("quantized" in d.reason for d in result.plan.decisions)
    assert out.read_bytes() == quantized.read_bytes()
    assert relative(outputs(source), outputs(out)) < INT8


def test_what_a_quantizer_left_is_factorized(tmp_path: Path) -> None:
    source, quantized, out = saved(tmp_path), tmp_path / "int8.onnx", tmp_path / "out.onnx"
    quantize_static(source, quantized, Samples(), nodes_to_exclude=["conv", "product"])
    result = onnxlr.optimize(quantized, out, rank="exact", verify="none")
    decided = {d.name: (d.decision, d.rank) for d in result.plan.decisions}
    assert decided.pop("gemm") == ("keep", None)
    assert set(decided.values()) == {("channel-svd", (4,)), ("svd", (4,))}
    onnx.checker.check_model(out, full_check=True)
    # Beside the quantized model, whose steps it keeps but for one that rounding may flip.
    assert relative(outputs(quantized), outputs(out)) < 2e-3


@pytest.mark.parametrize("expand", [False, True])
def test_half_precision_first(tmp_path: Path, expand: bool) -> None:
    """The converter leaves nodes out of order; factors stay in half precision, and fold."""
    source, narrow, out = saved(tmp_path), tmp_path / "half.onnx", tmp_path / "out.onnx"
    half(source, narrow)
    method = "expand-at-load" if expand else ("svd", "channel-svd")
    result = onnxlr.optimize(
        narrow, out, rank=4, method=method, expand_at_load=expand, verify="none"
    )
    assert len(result.plan.replaced) == 3
    onnx.checker.check_model(out, full_check=True)
    stored = Counter(t.data_type for t in onnx.load(out).graph.initializer if len(t.dims) > 1)
    assert stored == {onnx.TensorProto.FLOAT16: 6}
    assert relative(outputs(source), outputs(out)) < HALF
    if expand:
        assert operators_at_run_time(out, tmp_path) == operators_at_run_time(narrow, tmp_path)


def operators_at_run_time(path: Path, tmp_path: Path) -> Counter[str]:
    """The operators of a session, with what could be computed when it was loaded gone."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "session.onnx")
    options.log_severity_level = 4  # it warns that such a file is for this machine only
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(tmp_path / "session.onnx").graph.node)


def sentence_model() -> onnx.ModelProto:
    """An embedding, an LSTM and a product, which ONNX Runtime quantizes each in its own way."""
    return make_model(
        [
            node("Cast", ["x"], "i", to=onnx.TensorProto.INT64),
            node("Gather", ["table", "i"], "e", "embedding"),
            onnx.helper.make_node("LSTM", ["e", "w", "r"], ["s"], name="lstm", hidden_size=16),
            node("MatMul", ["s", "m"], "y", "product"),
        ],
        {"x": (5, 2)},
        ["y"],
        {
            "table": RNG.standard_normal((40, 24)).astype(np.float32),
            "w": RNG.standard_normal((1, 64, 24)).astype(np.float32),
            "r": RNG.standard_normal((1, 64, 16)).astype(np.float32),
            "m": RNG.standard_normal((16, 12)).astype(np.float32),
        },
    )


def test_quantized_embeddings_and_recurrent_weights_are_listed(tmp_path: Path) -> None:
    onnx.save(sentence_model(), tmp_path / "model.onnx")
    dynamic(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    rows = onnxlr.inspect(tmp_path / "int8.onnx")
    assert [row.layer.op for row in rows] == [
        *("Gather", "DynamicQuantizeLSTM", "DynamicQuantizeLSTM", "MatMulInteger")
    ]
    assert all("quantized" in (row.layer.weight_refusal or "") for row in rows)


def test_a_quantized_table_behind_dequantization_is_listed() -> None:
    model = make_model(
        [
            node("Cast", ["x"], "i", to=onnx.TensorProto.INT64),
            node("DequantizeLinear", ["q", "scale"], "table"),
            node("Gather", ["table", "i"], "y", "embedding"),
        ],
        {"x": (5, 2)},
        ["y"],
        {"q": np.ones((40, 24), np.int8), "scale": np.array(0.1, np.float32)},
    )
    (layer,) = layers_of(model)[2]
    assert layer.weight_refusal == "the weight is quantized (DequantizeLinear): left alone"


def test_a_variance_that_no_half_holds_is_folded_first(tmp_path: Path) -> None:
    """The PP-OCRv4 detector has one: float16 alone ruins it, float16 after onnxlr doesn't."""
    kernel = 1e4 * low_rank(RNG, 24, 16 * 9, 4).reshape(24, 16, 3, 3)
    norm = {"s": np.ones(24), "t": np.zeros(24), "mean": np.zeros(24), "var": np.full(24, 1e9)}
    model = make_model(
        [
            node("Conv", ["x", "k"], "c", "conv"),
            node("BatchNormalization", ["c", "s", "t", "mean", "var"], "y", "norm"),
        ],
        {"x": X},
        ["y"],
        {"k": kernel, **{name: array.astype(np.float32) for name, array in norm.items()}},
    )
    source, small = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(model, source)
    result = onnxlr.optimize(source, small, method="channel-svd", rank="exact", verify="none")
    assert len(result.plan.replaced) == 1
    half(small, tmp_path / "half.onnx")
    assert relative(outputs(source), outputs(tmp_path / "half.onnx")) < HALF
