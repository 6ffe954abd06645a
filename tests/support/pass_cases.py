"""The table of layer kinds, and the methods that each supports: a new method adds its name here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx

from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.methods.registry import choose_passes
from tests.support.builders import Array, layers_of, make_model, node, relative, run

TOLERANCE = 1e-5
CONV_1D = ("channel-svd", "input-channel-svd", "tiled-svd", "tucker2")
BOTH = (*CONV_1D, "spatial-svd")
CONV = (*BOTH, "slice-svd")
CP = ("cp", "cp3")
MATRIX = ("svd", "tiled-svd")
TABLE = ("embedding-svd", "tiled-svd")


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matmul(x: tuple[int, ...], w: tuple[int, ...], *, left: bool = False) -> onnx.ModelProto:
    order = ["w", "x"] if left else ["x", "w"]
    return make_model([node("MatMul", order, "y")], {"x": x}, ["y"], {"w": rand(*w)})


def gemm(
    *,
    left: bool = False,
    flip_w: int = 0,
    flip_x: int = 0,
    bias: bool = True,
    alpha: float = 1.0,
    beta: float = 1.0,
    opset: int = 17,
) -> onnx.ModelProto:
    k, out, rows = 8, 6, 4
    w = rand(*((k, out) if left == bool(flip_w) else (out, k)))
    if left:  # y = w' x: (out, k)(k, rows)
        w, x = rand(*((k, out) if flip_w else (out, k))), (rows, k) if flip_x else (k, rows)
        flags: dict[str, Any] = {"transA": flip_w, "transB": flip_x}
        inputs, c = ["w", "x"], rand(out, rows, seed=1)
    else:
        w, x = rand(*((out, k) if flip_w else (k, out))), (k, rows) if flip_x else (rows, k)
        flags = {"transA": flip_x, "transB": flip_w}
        inputs, c = ["x", "w"], rand(out, seed=1)
    weights = {"w": w} | ({"c": c} if bias else {})
    inputs += ["c"] if bias else []
    gemm_node = node("Gemm", inputs, "y", alpha=alpha, beta=beta, **flags)
    return make_model([gemm_node], {"x": x}, ["y"], weights, opset=opset)


def conv(
    x: tuple[int, ...], w: tuple[int, ...], *, bias: bool = True, opset: int = 17, **attributes: Any
) -> onnx.ModelProto:
    weights = {"w": rand(*w)} | ({"b": rand(w[0], seed=1)} if bias else {})
    inputs = ["x", "w"] + (["b"] if bias else [])
    return make_model(
        [node("Conv", inputs, "y", "conv", **attributes)], {"x": x}, ["y"], weights, opset=opset
    )


def transposed(x: tuple[int, ...], w: tuple[int, ...], **attributes: Any) -> onnx.ModelProto:
    weights = {"w": rand(*w), "b": rand(w[1] * attributes.get("group", 1), seed=1)}
    nodes = [node("ConvTranspose", ["x", "w", "b"], "y", "conv", **attributes)]
    return make_model(nodes, {"x": x}, ["y"], weights)


def gather(
    indices: tuple[int, ...], table: tuple[int, ...] = (11, 6), **attributes: Any
) -> onnx.ModelProto:
    nodes = [
        node("Cast", ["x"], "i", to=onnx.TensorProto.INT64),
        node("Gather", ["w", "i"], "y", "embedding", **attributes),
    ]
    return make_model(nodes, {"x": indices}, ["y"], {"w": rand(*table)})


def gather_both(dims: int) -> onnx.ModelProto:
    """One table as it is, and with its last two axes exchanged, indexed along the same one."""
    perm = [*range(dims - 2), dims - 1, dims - 2]
    nodes = [
        node("Cast", ["x"], "i", to=onnx.TensorProto.INT64),
        node("Transpose", ["w"], "v", perm=perm),
        node("Gather", ["w", "i"], "y", "embedding", axis=dims - 2),
        node("Gather", ["v", "i"], "z", "other", axis=-1),
    ]
    return make_model(nodes, {"x": (2, 3)}, ["y", "z"], {"w": rand(*(5,) * (dims - 2), 11, 6)})


def tied(*last: Any, table: tuple[int, int] = (11, 6), axis: int = 0) -> onnx.ModelProto:
    """A table that is looked up, and multiplied by the last nodes, from ``h`` to ``y``."""
    nodes = [
        node("Cast", ["x"], "i", to=onnx.TensorProto.INT64),
        node("Gather", ["w", "i"], "e", "embedding", axis=axis),
        node("Tanh", ["e"], "h"),
        *last,
    ]
    indices = (5,) if axis or any(n.op_type == "Gemm" for n in last) else (2, 3)
    return make_model(
        nodes, {"x": indices}, ["y"], {"w": rand(*table), "c": rand(table[axis], seed=1)}
    )


def tied_in_branches(table: tuple[int, int]) -> onnx.ModelProto:
    """Both branches multiply the table that was looked up before them."""
    out = onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, [2, 3, table[0]])
    nodes = [node("Transpose", ["w"], "v"), node("MatMul", ["h", "v"], "o", "head")]
    plus = [nodes[0], node("MatMul", ["h", "v"], "m", "other"), node("Add", ["m", "c"], "o")]
    gate = onnx.helper.make_node(
        *("If", ["yes"], ["y"]),
        then_branch=onnx.helper.make_graph(nodes, "then", [], [out]),
        else_branch=onnx.helper.make_graph(plus, "else", [], [out]),
    )
    above = node("GreaterOrEqual", ["last", "last"], "yes")
    return tied(node("ReduceMax", ["h"], "last", keepdims=0), above, gate, table=table)


def viewed(op: str, **attributes: Any) -> onnx.ModelProto:
    """A weight behind a view."""
    shape = (6, 8) if op == "Transpose" else (8, 6)
    return make_model(
        [node(op, ["w"], "v", **attributes), node("MatMul", ["x", "v"], "y")],
        {"x": (4, 8)},
        ["y"],
        {"w": rand(*shape)},
    )


def shared() -> onnx.ModelProto:
    """One weight as W, as Wᵀ through a Transpose, and in Gemms with both flags."""
    return make_model(
        [
            node("MatMul", ["x", "w"], "a"),
            node("Transpose", ["w"], "wt", perm=[1, 0]),
            node("MatMul", ["a", "wt"], "b"),
            node("Gemm", ["b", "wt"], "c", transB=1),
            node("Gemm", ["c", "w"], "d", transB=1, alpha=0.5),
            node("MatMul", ["w", "z"], "e"),
            node("MatMul", ["wt", "e"], "f"),
            node("MatMul", ["w", "f"], "g"),
            node("MatMul", ["d", "g"], "y"),
        ],
        {"x": (4, 8), "z": (6, 3)},
        ["y"],
        {"w": rand(8, 6)},
    )


CASES: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[str, ...]]] = {
    "matmul": (lambda: matmul((4, 8), (8, 6)), MATRIX),
    "matmul-3d": (lambda: matmul((2, 4, 8), (8, 6)), MATRIX),
    "matmul-4d": (lambda: matmul((2, 3, 4, 8), (8, 6)), MATRIX),
    "matmul-vector": (lambda: matmul((8,), (8, 6)), MATRIX),
    "matmul-left": (lambda: matmul((6, 4), (8, 6), left=True), MATRIX),
    "matmul-left-3d": (lambda: matmul((2, 6, 4), (8, 6), left=True), MATRIX),
    "matmul-left-vector": (lambda: matmul((6,), (8, 6), left=True), ("svd",)),
    "matmul-batched": (lambda: matmul((3, 4, 7), (3, 7, 5)), ("svd",)),
    "matmul-batched-broadcast": (lambda: matmul((4, 7), (2, 3, 7, 5)), ("svd",)),
    "matmul-batched-left": (lambda: matmul((3, 5, 4), (3, 7, 5), left=True), ("svd",)),
    "matmul-transposed": (lambda: viewed("Transpose"), MATRIX),
    "matmul-identity": (lambda: viewed("Identity"), MATRIX),
    "matmul-shared": (shared, MATRIX),
    **{
        f"gemm-{'left-' if left else ''}{flip_w}{flip_x}{'-bias' if bias else ''}-opset{opset}": (
            partial(
                gemm,
                left=left,
                flip_w=flip_w,
                flip_x=flip_x,
                bias=bias,
                opset=opset,
                alpha=0.7,
                beta=1.3,
            ),
            MATRIX,
        )
        for left in (False, True)
        for flip_w in (0, 1)
        for flip_x in (0, 1)
        for bias, opset in ((True, 7), (True, 17), (False, 11))
    },
    "conv": (lambda: conv((2, 6, 9, 8), (8, 6, 3, 3), pads=[1, 1, 1, 1]), (*CONV, *CP)),
    "conv-no-bias": (lambda: conv((2, 6, 9, 8), (8, 6, 3, 3), bias=False), (*CONV, *CP)),
    "conv-stride": (lambda: conv((1, 6, 9, 8), (8, 6, 3, 3), strides=[2, 3]), (*CONV, *CP)),
    "conv-dilation": (lambda: conv((1, 6, 9, 12), (8, 6, 3, 3), dilations=[2, 3]), (*CONV, *CP)),
    "conv-asymmetric": (lambda: conv((1, 6, 9, 8), (8, 6, 3, 2), pads=[0, 2, 1, 0]), (*CONV, *CP)),
    "conv-same-upper": (
        lambda: conv((1, 6, 9, 8), (8, 6, 4, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
        (*CONV, *CP),
    ),
    "conv-same-lower": (
        lambda: conv((1, 6, 9, 8), (8, 6, 4, 3), auto_pad="SAME_LOWER", strides=[2, 1]),
        (*CONV, *CP),
    ),
    "conv-empty-word": (
        lambda: conv((1, 6, 9, 8), (8, 6, 3, 3), auto_pad="", pads=[1, 0, 2, 1]),
        (*CONV, *CP),
    ),
    "conv-valid": (lambda: conv((1, 6, 9, 8), (8, 6, 3, 3), auto_pad="VALID"), (*CONV, *CP)),
    "conv-grouped": (lambda: conv((2, 6, 9, 8), (9, 2, 3, 3), group=3, strides=[2, 1]), CONV),
    "conv-depthwise": (lambda: conv((1, 6, 9, 8), (12, 1, 3, 3), group=6), CONV),
    "conv-pointwise": (lambda: conv((1, 6, 9, 8), (8, 6, 1, 1)), CONV_1D),
    "conv-pointwise-stride-pad": (
        lambda: conv((1, 6, 9, 8), (8, 6, 1, 1), strides=[2, 2], pads=[1, 0, 2, 1]),
        CONV_1D,
    ),
    "conv-1d": (lambda: conv((2, 6, 20), (8, 6, 5), strides=[2], pads=[2, 1]), (*CONV_1D, *CP)),
    "conv-1d-long": (lambda: conv((2, 1, 300), (8, 1, 64), strides=[4]), (*CONV_1D, *CP)),
    "conv-3d": (lambda: conv((1, 4, 5, 6, 7), (6, 4, 3, 2, 3), strides=[1, 2, 1]), (*CONV, *CP)),
    "conv-opset7": (lambda: conv((1, 6, 9, 8), (8, 6, 3, 3), opset=7), (*CONV, *CP)),
    "deconv": (lambda: transposed((2, 6, 5, 4), (6, 8, 3, 3), strides=[2, 2]), (*BOTH, *CP)),
    "deconv-padded": (
        lambda: transposed(
            (1, 6, 5, 4), (6, 8, 4, 3), strides=[2, 3], pads=[1, 0, 2, 1], output_padding=[1, 2]
        ),
        (*BOTH, *CP),
    ),
    "deconv-grouped": (
        lambda: transposed((1, 6, 5, 4), (6, 4, 3, 2), group=3, dilations=[2, 1]),
        BOTH,
    ),
    "deconv-same": (
        lambda: transposed((1, 6, 5, 4), (6, 8, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
        (*BOTH, *CP),
    ),
    "deconv-sized": (
        lambda: transposed((1, 6, 5, 4), (6, 8, 3, 3), strides=[2, 2], output_shape=[10, 9]),
        (*CONV_1D, "cp3"),
    ),
    "deconv-1d": (lambda: transposed((2, 6, 9), (6, 8, 5), strides=[3]), (*CONV_1D, *CP)),
    "deconv-3d": (
        lambda: transposed((1, 4, 3, 4, 3), (4, 5, 2, 3, 2), strides=[1, 2, 1]),
        (*BOTH, *CP),
    ),
    "gather": (lambda: gather((3, 4)), TABLE),
    "gather-negative-axis": (lambda: gather((5,), axis=-2), TABLE),
    "gather-one": (lambda: gather(()), TABLE),
    "gather-columns": (lambda: gather((2, 3), axis=1), ("embedding-svd",)),
    "gather-columns-one": (lambda: gather((), axis=1), ("embedding-svd",)),
    "gather-middle": (lambda: gather((2, 3), (4, 11, 3), axis=1), ("embedding-svd",)),
    "gather-planes": (lambda: gather((5,), (11, 4, 3)), ("embedding-svd", "svd")),
    "gather-plane": (lambda: gather((), (5, 6, 7)), ("embedding-svd", "svd")),
    "gather-transposed": (lambda: gather_both(2), ("embedding-svd",)),
    "gather-transposed-3d": (lambda: gather_both(3), ("embedding-svd",)),
    "tied-gemm": (
        lambda: tied(node("Gemm", ["h", "w", "c"], "y", "head", transB=1, alpha=0.5, beta=2.0)),
        ("embedding-svd",),
    ),
    "tied-matmul": (
        lambda: tied(node("Transpose", ["w"], "v"), node("MatMul", ["h", "v"], "y", "head")),
        ("embedding-svd",),
    ),
    "tied-columns": (
        lambda: tied(
            *(node("Transpose", ["h"], "t"), node("MatMul", ["t", "w"], "y", "head")),
            table=(6, 11),
            axis=1,
        ),
        ("embedding-svd",),
    ),
    "tied-columns-gemm": (
        lambda: tied(node("Gemm", ["h", "w", "c"], "y", "head", transA=1), table=(6, 11), axis=1),
        ("embedding-svd",),
    ),
}
ROWS = [(case, method) for case, (_, methods) in CASES.items() for method in methods]


def feed_for(model: onnx.ModelProto, seed: int = 7) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        v.name: rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for v in model.graph.input
    }


def the_layer(model: onnx.ModelProto, method: str) -> tuple[Layer, GraphPass]:
    (layer,) = layers_of(model)[2]
    assert layer.refusal is None
    return layer, choose_passes((method,))[0]


def assert_same_outputs(model: onnx.ModelProto, other: onnx.ModelProto, limit: float) -> None:
    feed = feed_for(model)
    for before, after in zip(run(model, feed), run(other, feed), strict=True):
        assert relative(before, after) <= limit
