"""Small ONNX models for the tests, built from arrays and node texts."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from onnxlr.layers.find import find_layers
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.registry import choose_passes
from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.shapes import infer_shapes
from onnxlr.rewrite.replace import rewrite
from onnxlr.types import Rank

Array = NDArray[Any]
_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
    "float16": onnx.TensorProto.FLOAT16,
    "int64": onnx.TensorProto.INT64,
}


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str | None]],
    outputs: Sequence[str],
    weights: Mapping[str, Array],
    *,
    opset: int = 17,
    ir_version: int = 8,
    dtype: str = "float32",
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A checked model; output shapes are left to inference."""
    graph = onnx.helper.make_graph(
        list(nodes),
        "test",
        [onnx.helper.make_tensor_value_info(n, _TYPES[dtype], list(s)) for n, s in inputs.items()],
        [onnx.helper.make_tensor_value_info(n, _TYPES[dtype], None) for n in outputs],
        [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    items: list[Any] = [*nodes, *functions]
    others = [item.domain for item in items if item.domain]
    model = onnx.helper.make_model(
        graph,
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            *(onnx.helper.make_opsetid(domain, 1) for domain in dict.fromkeys(others)),
        ],
        functions=list(functions),
    )
    model.ir_version = ir_version
    if ir_version < 4:  # then every initializer is an input too
        model.graph.input.extend(
            onnx.helper.make_tensor_value_info(n, _TYPES[w.dtype.name], w.shape)
            for n, w in weights.items()
        )
    inferred = onnx.shape_inference.infer_shapes(model)
    del model.graph.output[:]
    model.graph.output.extend(inferred.graph.output)
    return model


def node(op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> Any:
    """A node with one output."""
    return onnx.helper.make_node(op, list(inputs), [output], name=name or None, **attributes)


def linear(
    weight: Array, *, rows: int | str = 4, name: str = "fc", dtype: str = "float32"
) -> onnx.ModelProto:
    """``y = x @ weight``."""
    return make_model(
        [node("MatMul", ["x", "w"], "y", name)],
        {"x": [rows, weight.shape[0]]},
        ["y"],
        {"w": weight},
        dtype=dtype,
    )


def low_rank(rng: np.random.Generator, m: int, n: int, rank: int) -> Array:
    """A float32 m × n matrix of this exact rank, with a gentle spectrum."""
    product = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    return np.asarray(product / np.sqrt(rank), dtype=np.float32)


def run(
    model: onnx.ModelProto, feed: Mapping[str, Array], *, optimized: bool = False
) -> list[Array]:
    """All outputs in ONNX Runtime, without graph optimizations unless they are asked for."""
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1  # a pool of threads costs more than such runs
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(y) for y in session.run(None, dict(feed))]


def relative(a: Array, b: Array) -> float:
    """‖a − b‖ / ‖a‖ in double precision."""
    assert a.shape == b.shape
    difference = np.linalg.norm(a.astype(np.float64) - b.astype(np.float64))
    return float(difference / max(float(np.linalg.norm(a.astype(np.float64))), 1e-300))


def layers_of(
    model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[ir.Model, dict[str, tuple[int, ...]], tuple[Layer, ...]]:
    """The loaded graph, its static shapes and its layers."""
    source = load(model).model
    static = inputs or {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.input
    }
    shapes = infer_shapes(source, static)
    return source, shapes, find_layers(source, shapes)


def replaced(
    model: onnx.ModelProto,
    method: str,
    rank: Rank,
    *,
    names: Sequence[str] | None = None,
    check: bool = True,
    factors: tuple[Array, ...] | None = None,
) -> onnx.ModelProto:
    """The model with its layers (all that the method supports, or these) at this rank.

    Without ``factors`` the method factorizes each.
    """
    source, shapes, layers = layers_of(model)
    graph_pass = choose_passes((method,))[0]
    chosen = [
        layer
        for layer in layers
        if (names is None or layer.name in names)
        and layer.refusal is None
        and graph_pass.refuse(layer) is None
    ]
    assert chosen, "nothing to replace"
    choices = {layer.name: Choice(graph_pass, rank) for layer in chosen}
    ready = {layer.name: Factored(factors or graph_pass.factorize(layer, rank)) for layer in chosen}
    result = to_proto(rewrite(source, shapes, choices, ready))
    if check:
        onnx.checker.check_model(result, full_check=True)
    return result


def abort(*_: object) -> None:
    """Abort this process, as a crash of a library does."""
    os.abort()
