"""Small sound models of every kind of layer: what the fuzzer bends and breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Inputs = Mapping[str, tuple[int, Sequence[int | str]]]

_OPSET = 17
_SIDE = 24  # of a weight: small files, and yet a low rank saves something
_FLOAT = TensorProto.FLOAT


def _low_rank(m: int, n: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    rng = np.random.default_rng(seed)
    whole = rng.standard_normal((m, 4)) @ rng.standard_normal((4, n))
    return np.asarray((whole / 2 / np.sqrt(max(m, n))).astype(dtype))


def _kernel(*shape: int, seed: int = 0) -> Array:
    return _low_rank(shape[0], int(np.prod(shape[1:])), seed).reshape(shape)


def _node(op: str, inputs: Sequence[str], outputs: str, name: str = "", **attributes: Any) -> Any:
    return helper.make_node(op, list(inputs), outputs.split(), name=name, **attributes)


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Inputs,
    weights: Mapping[str, Array],
    *,
    out: int = _FLOAT,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "seed",
        [helper.make_tensor_value_info(n, kind, list(dims)) for n, (kind, dims) in inputs.items()],
        [helper.make_tensor_value_info("y", out, None)],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    domains = {f.domain for f in functions}
    imports = [helper.make_opsetid("", _OPSET), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions))
    model.ir_version = 8
    return _with_output_shape(model)


def _with_output_shape(model: onnx.ModelProto) -> onnx.ModelProto:
    inferred = onnx.shape_inference.infer_shapes(model)
    if inferred.graph.output[0].type.tensor_type.HasField("shape"):
        model.graph.output[0].CopyFrom(inferred.graph.output[0])
    return model


def mlp(kind: int = _FLOAT, dtype: Any = np.float32) -> onnx.ModelProto:
    """A MatMul and a Gemm with a bias."""
    nodes = [
        _node("MatMul", ["x", "w1"], "h", "fc1"),
        _node("Relu", ["h"], "r", "relu"),
        _node("Gemm", ["r", "w2", "b"], "y", "fc2", transB=1, alpha=0.5),
    ]
    w1, w2 = _low_rank(_SIDE, _SIDE, 1, dtype), _low_rank(16, _SIDE, 2, dtype)
    weights = {"w1": w1, "w2": w2, "b": np.ones(16, dtype)}
    return _model(nodes, {"x": (kind, ["n", _SIDE])}, weights, out=kind)


def convnet() -> onnx.ModelProto:
    """Conv with BatchNormalization, grouped Conv, ConvTranspose, a pooled head."""
    nodes = [
        _node("Conv", ["x", "k1", "b1"], "c1", "conv1", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        _node("BatchNormalization", ["c1", "s", "t", "m", "v"], "n1", "bn"),
        _node("Relu", ["n1"], "r1"),
        _node("Conv", ["r1", "k2"], "c2", "conv2", group=2, strides=[2, 2], dilations=[1, 1]),
        _node("ConvTranspose", ["c2", "k3"], "c3", "up", strides=[2, 2], output_padding=[1, 1]),
        _node("MaxPool", ["c3"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        _node("GlobalAveragePool", ["p"], "g"),
        _node("Flatten", ["g"], "f", axis=1),
        _node("MatMul", ["f", "w"], "y", "head"),
    ]
    ones = np.ones(16, np.float32)
    weights: dict[str, Array] = {
        "k1": _kernel(16, 8, 3, 3),
        "b1": ones,
        **dict.fromkeys("stmv", ones),
        "k2": _kernel(16, 8, 3, 3, seed=1),
        "k3": _kernel(16, 12, 3, 3, seed=2),
        "w": _low_rank(12, 8),
    }
    return _model(nodes, {"x": (_FLOAT, [1, 8, 8, 8])}, weights)


def embedding() -> onnx.ModelProto:
    """A table, looked up and multiplied."""
    nodes = [
        _node("Gather", ["table", "x"], "e", "embed", axis=0),
        _node("ReduceMean", ["e"], "m", axes=[1], keepdims=0),
        _node("MatMul", ["m", "w"], "y", "fc"),
    ]
    weights = {"table": _low_rank(40, _SIDE), "w": _low_rank(_SIDE, 16)}
    return _model(nodes, {"x": (TensorProto.INT64, ["n", 5])}, weights)


def recurrent() -> onnx.ModelProto:
    """An LSTM, a GRU and a product."""
    nodes = [
        _node("LSTM", ["x", "w", "r"], "l", "lstm", hidden_size=8),
        _node("Squeeze", ["l", "one"], "s"),
        _node("GRU", ["s", "gw", "gr"], "g", "gru", hidden_size=8),
        _node("Squeeze", ["g", "one"], "t"),
        _node("MatMul", ["t", "v"], "y", "fc"),
    ]
    weights: dict[str, Array] = {
        "w": _low_rank(32, 16)[None],
        "r": _low_rank(32, 8)[None],
        "gw": _low_rank(24, 8)[None],
        "gr": _low_rank(24, 8)[None],
        "v": _low_rank(8, 8),
        "one": np.array([1], np.int64),
    }
    return _model(nodes, {"x": (_FLOAT, [4, 1, 16])}, weights)


def _branch(name: str, weight: Array) -> onnx.GraphProto:
    return helper.make_graph(
        [_node("MatMul", ["x", f"{name}_w"], f"{name}_y", f"{name}_fc")],
        name,
        [],
        [helper.make_tensor_value_info(f"{name}_y", _FLOAT, None)],
        [numpy_helper.from_array(weight, f"{name}_w")],
    )


def branches() -> onnx.ModelProto:
    """An If with a product in either branch."""
    then, other = (_branch(n, _low_rank(_SIDE, 16, i)) for i, n in enumerate(("then", "else")))
    nodes = [
        _node("ReduceSum", ["x"], "total", keepdims=0),
        _node("Greater", ["total", "zero"], "positive"),
        _node("If", ["positive"], "h", "if", then_branch=then, else_branch=other),
        _node("MatMul", ["h", "w"], "y", "fc"),
    ]
    weights: dict[str, Array] = {"zero": np.array(0, np.float32), "w": _low_rank(16, 16)}
    return _model(nodes, {"x": (_FLOAT, [4, _SIDE])}, weights)


def loop() -> onnx.ModelProto:
    """A Loop whose body multiplies."""
    body = helper.make_graph(
        [
            _node("MatMul", ["state", "w"], "next", "inner"),
            _node("Identity", ["go"], "again"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", _FLOAT, [4, _SIDE]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", _FLOAT, [4, _SIDE]),
        ],
    )
    nodes = [
        _node("Loop", ["times", "true", "x"], "h", "loop", body=body),
        _node("Gemm", ["h", "v"], "y", "fc"),
    ]
    weights: dict[str, Array] = {
        "times": np.array(3, np.int64),
        "true": np.array(True),
        "w": _low_rank(_SIDE, _SIDE),
        "v": _low_rank(_SIDE, 16),
    }
    return _model(nodes, {"x": (_FLOAT, [4, _SIDE])}, weights)


def _function(name: str, nodes: Sequence[onnx.NodeProto]) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], list(nodes), imports)


def functions() -> onnx.ModelProto:
    """A local function with a weight, called by another and twice by the graph."""
    inside = numpy_helper.from_array(_low_rank(_SIDE, _SIDE), "inside")
    dense = [
        _node("Constant", [], "w", value=inside),
        _node("MatMul", ["a", "w"], "b", "dense"),
    ]
    outer = [
        helper.make_node("Dense", ["a"], ["c"], domain="local"),
        _node("Relu", ["c"], "b"),
    ]
    nodes = [
        helper.make_node("Outer", ["x"], ["h"], domain="local"),
        helper.make_node("Dense", ["h"], ["g"], domain="local"),
        _node("MatMul", ["g", "v"], "y", "fc"),
    ]
    made = [_function("Dense", dense), _function("Outer", outer)]
    return _model(nodes, {"x": (_FLOAT, [4, _SIDE])}, {"v": _low_rank(_SIDE, 16)}, functions=made)


def quantized() -> onnx.ModelProto:
    """A quantized weight, one that is not, and an integer product."""
    stored = np.arange(_SIDE * 16, dtype=np.int64).astype(np.int8).reshape(_SIDE, 16)
    nodes = [
        _node("QuantizeLinear", ["x", "s", "z"], "xq"),
        _node("DequantizeLinear", ["xq", "s", "z"], "xd"),
        _node("DequantizeLinear", ["q", "s", "z8"], "w"),
        _node("MatMul", ["xd", "w"], "h", "quantized"),
        _node("MatMul", ["h", "v"], "y", "fc"),
    ]
    weights: dict[str, Array] = {
        "s": np.array(0.02, np.float32),
        "z": np.array(128, np.uint8),
        "z8": np.array(0, np.int8),
        "q": stored,
        "v": _low_rank(16, 16),
    }
    return _model(nodes, {"x": (_FLOAT, [4, _SIDE])}, weights)


def views() -> onnx.ModelProto:
    """One half-precision weight behind Transpose, Cast and Identity, used from both sides."""
    nodes = [
        _node("Cast", ["w"], "w32", to=_FLOAT),
        _node("Transpose", ["w32"], "wt", perm=[1, 0]),
        _node("Identity", ["wt"], "wi"),
        _node("MatMul", ["x", "w32"], "h", "there"),
        _node("MatMul", ["h", "wi"], "g", "back"),
        _node("Constant", [], "v", value=numpy_helper.from_array(_low_rank(_SIDE, 16), "v")),
        _node("Einsum", ["g", "v"], "y", "einsum", equation="ij,jk->ik"),
    ]
    weights = {"w": _low_rank(_SIDE, _SIDE, dtype=np.float16)}
    return _model(nodes, {"x": (_FLOAT, [4, _SIDE])}, weights)


def brain_float() -> onnx.ModelProto:
    """A bfloat16 weight, cast where it is used."""
    w = numpy_helper.from_array(_low_rank(_SIDE, _SIDE), "w")
    narrow = TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=w.dims)
    bits = np.frombuffer(w.raw_data, np.uint32) >> 16
    narrow.raw_data = bits.astype(np.uint16).tobytes()
    nodes = [_node("Cast", ["w"], "w32", to=_FLOAT), _node("MatMul", ["x", "w32"], "y", "fc")]
    model = _model(nodes, {"x": (_FLOAT, ["n", _SIDE])}, {})
    model.graph.initializer.append(narrow)
    return _with_output_shape(model)


def shapes() -> onnx.ModelProto:
    """Operators whose attributes and integer inputs say how large their outputs are."""
    nodes = [
        _node("Pad", ["x", "pads"], "p", "pad"),
        _node("Resize", ["p", "", "scales"], "z", "resize", mode="nearest"),
        _node("Conv", ["z", "k"], "c", "conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        _node("Reshape", ["c", "flat"], "f", "reshape"),
        _node("ConstantOfShape", ["size"], "ones", "fill"),
        _node("Expand", ["one", "size"], "e", "expand"),
        _node("Tile", ["e", "repeats"], "t", "tile"),
        _node("Range", ["start", "limit", "step"], "count", "range"),
        _node("MatMul", ["f", "w"], "h", "fc"),
        _node("ReduceSum", ["ones"], "o", keepdims=0),
        _node("ReduceSum", ["t"], "u", keepdims=0),
        _node("ReduceSum", ["count"], "v", keepdims=0),
        _node("Sum", ["h", "o", "u", "v"], "y"),
    ]
    weights: dict[str, Array] = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "scales": np.array([1, 1, 0.5, 0.5], np.float32),
        "k": _kernel(12, 8, 3, 3),
        "flat": np.array([-1, 300], np.int64),
        "size": np.array([2, 3], np.int64),
        "one": np.ones(1, np.float32),
        "repeats": np.array([2, 1], np.int64),
        "start": np.array(0, np.float32),
        "limit": np.array(5, np.float32),
        "step": np.array(1, np.float32),
        "w": _low_rank(300, 12),
    }
    return _model(nodes, {"x": (_FLOAT, [1, 8, 8, 8])}, weights)


SEEDS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": mlp,
    "mlp-half": lambda: mlp(TensorProto.FLOAT16, np.float16),
    "mlp-double": lambda: mlp(TensorProto.DOUBLE, np.float64),
    "convnet": convnet,
    "embedding": embedding,
    "recurrent": recurrent,
    "branches": branches,
    "loop": loop,
    "functions": functions,
    "quantized": quantized,
    "views": views,
    "brain-float": brain_float,
    "shapes": shapes,
}


def externalize(model: onnx.ModelProto, file: str = "in.data") -> bytes:
    """Move the weights into external data, in place; the bytes of that file."""
    content = b""
    for tensor in model.graph.initializer:
        data = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": file, "offset": str(len(content)), "length": str(len(data))}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        content += data
    return content
