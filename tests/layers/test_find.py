"""Finding layers: where weights hide, who shares them, and the reason where none can help."""

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest

from onnxlr.layers.layer import Layer
from tests.support.builders import Array, layers_of, make_model, node, relative, replaced, run

RNG = np.random.default_rng(0)
W = RNG.standard_normal((7, 5)).astype(np.float32)
K = RNG.standard_normal((8, 6, 3, 3)).astype(np.float32)
X = {"x": (4, 7)}


def layers_in(model: onnx.ModelProto) -> tuple[Layer, ...]:
    return layers_of(model)[2]


def constant_node(array: Array, name: str) -> Any:
    return onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))


def test_weights_in_constant_nodes_of_unnamed_nodes() -> None:
    model = make_model([constant_node(W, "w"), node("MatMul", ["x", "w"], "y")], X, ["y"], {})
    (layer,) = layers_in(model)
    assert (layer.name, layer.op, layer.shape, layer.refusal) == ("w", "MatMul", (7, 5), None)
    np.testing.assert_array_equal(layer.array(), W)


def test_an_initializer_that_is_an_input_too() -> None:
    model = make_model([node("MatMul", ["x", "w"], "y", "fc")], X, ["y"], {"w": W}, ir_version=3)
    (layer,) = layers_of(model, X)[2]
    assert (layer.name, layer.refusal) == ("fc", None)


@pytest.mark.parametrize(
    ("views", "shape"),
    [
        ([("Identity", {})], (7, 5)),
        ([("Transpose", {"perm": [1, 0]})], (5, 7)),
        ([("Transpose", {})], (5, 7)),
        ([("Transpose", {}), ("Identity", {}), ("Transpose", {})], (7, 5)),
        ([("Cast", {"to": 1}), ("Transpose", {})], (5, 7)),
    ],
)
def test_views(views: list[tuple[str, dict[str, Any]]], shape: tuple[int, ...]) -> None:
    nodes, last = [], "w"
    for i, (op, attributes) in enumerate(views):
        nodes.append(node(op, [last], f"v{i}", **attributes))
        last = f"v{i}"
    nodes.append(node("MatMul", ["x", last], "y"))
    stored = W if shape == (7, 5) else W.T.copy()
    (layer,) = layers_in(make_model(nodes, X, ["y"], {"w": stored}))
    assert layer.shape == (7, 5)
    assert layer.refusal is None
    np.testing.assert_array_equal(layer.array(), W)


def test_a_3d_transpose_chain_composes_in_the_right_order() -> None:
    stored = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    nodes = [
        node("Transpose", ["w"], "a", perm=[2, 0, 1]),
        node("Transpose", ["a"], "b", perm=[1, 0, 2]),
        node("MatMul", ["x", "b"], "y"),
    ]
    (layer,) = layers_in(make_model(nodes, {"x": (2, 5, 4)}, ["y"], {"w": stored}))
    expected = stored.transpose(2, 0, 1).transpose(1, 0, 2)
    np.testing.assert_array_equal(layer.array(), expected)


def test_all_users_of_a_weight_are_one_layer() -> None:
    model = make_model(
        [
            node("MatMul", ["x", "w"], "a", "first"),
            node("MatMul", ["z", "w"], "b", "second"),
            node("Add", ["a", "b"], "y"),
        ],
        {"x": (4, 7), "z": (4, 7)},
        ["y"],
        {"w": W},
    )
    (layer,) = layers_in(model)
    assert [u.node.name for u in layer.uses] == ["first", "second"]
    assert layer.params == 35
    assert layer.macs == 2 * 4 * 35


def body(name: str, nodes: list[Any]) -> onnx.GraphProto:
    return onnx.helper.make_graph(
        nodes, name, [], [onnx.helper.make_tensor_value_info("o", 1, [4, 5])]
    )


def if_model() -> onnx.ModelProto:
    branches = {
        f"{n}_branch": body(n, [node("MatMul", ["x", w], "o")])
        for n, w in (("then", "w"), ("else", "w2"))
    }
    return make_model(
        [
            node("Greater", ["x", "x"], "g"),
            node("Cast", ["g"], "f", to=1),
            node("ReduceMax", ["f"], "m", keepdims=0),
            node("Cast", ["m"], "c", to=9),
            onnx.helper.make_node("If", ["c"], ["y"], name="gate", **branches),
        ],
        X,
        ["y"],
        {"w": W, "w2": W},
    )


def foreign() -> onnx.ModelProto:
    return make_model(
        [
            node("MatMul", ["x", "w"], "a"),
            node("ReduceSum", ["w"], "s", "sum"),
            node("Add", ["a", "s"], "y"),
        ],
        X,
        ["y"],
        {"w": W},
    )


def quantized() -> onnx.ModelProto:
    return make_model(
        [node("DequantizeLinear", ["q", "scale"], "w"), node("MatMul", ["x", "w"], "y")],
        X,
        ["y"],
        {"q": np.ones((7, 5), np.int8), "scale": np.array(0.1, np.float32)},
    )


def computed() -> onnx.ModelProto:
    return make_model(
        [node("Mul", ["w", "w"], "v", "square"), node("MatMul", ["x", "v"], "y")],
        X,
        ["y"],
        {"w": W},
    )


def tied() -> onnx.ModelProto:
    return make_model(
        [
            node("Shape", ["x"], "s"),
            node("Gather", ["w", "s"], "e"),
            node("MatMul", ["x", "w"], "a"),
            node("ReduceSum", ["e"], "t"),
            node("Add", ["a", "t"], "y"),
        ],
        X,
        ["y"],
        {"w": W},
    )


def test_a_table_that_is_looked_up_and_multiplied_is_one_layer() -> None:
    (layer,) = layers_in(tied())
    assert (layer.kind, layer.op, layer.refusal) == ("tied", "Gather", None)
    assert [use.node.op_type for use in layer.uses] == ["Gather", "MatMul"]


def both_convs() -> onnx.ModelProto:
    kernel = RNG.standard_normal((6, 6, 3, 3)).astype(np.float32)
    nodes = [node("Conv", ["x", "k"], "c"), node("ConvTranspose", ["c", "k"], "y")]
    return make_model(nodes, {"x": (1, 6, 5, 5)}, ["y"], {"k": kernel})


def transposed_conv() -> onnx.ModelProto:
    return make_model(
        [node("ConvTranspose", ["x", "k"], "y")], {"x": (1, 8, 5, 5)}, ["y"], {"k": K}
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (foreign(), "ReduceSum 'sum' also needs the whole weight"),
        (quantized(), "the weight is quantized"),
        (
            computed(),
            "Mul 'square' computes the weight from constants, and would make the file",
        ),
        (both_convs(), "shared by Conv, ConvTranspose, which no single factorization serves"),
    ],
)
def test_reasons(model: onnx.ModelProto, reason: str) -> None:
    assert reason in (layers_in(model)[0].refusal or "")


def test_layers_in_bodies_are_found_and_replaced() -> None:
    model = if_model()
    layers = layers_in(model)
    assert [(layer.weight.name, layer.refusal) for layer in layers] == [("w2", None), ("w", None)]
    written = replaced(model, "svd", (5,))
    assert [t.name for t in written.graph.initializer] == [
        "w2/svd_0",
        "w2/svd_1",
        "w/svd_0",
        "w/svd_1",
    ]
    for branch in written.graph.node[-1].attribute:
        assert [n.op_type for n in branch.g.node] == ["MatMul", "MatMul"]
    x = RNG.standard_normal((4, 7)).astype(np.float32)
    assert relative(run(model, {"x": x})[0], run(written, {"x": x})[0]) < 1e-5


def test_a_weight_of_a_body_s_own() -> None:
    """A Loop that multiplies its state three times by a constant of its body."""
    square = (RNG.standard_normal((7, 7)) / 3).astype(np.float32)
    loop_body = onnx.helper.make_graph(
        [
            constant_node(square, "square"),
            node("MatMul", ["state", "square"], "next", "inner"),
            node("Identity", ["going"], "go_on"),
        ],
        "body",
        [
            onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            onnx.helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("state", 1, [4, 7]),
        ],
        [
            onnx.helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("next", 1, [4, 7]),
        ],
    )
    loop = onnx.helper.make_node("Loop", ["count", "", "x"], ["y"], body=loop_body)
    model = make_model([loop], X, ["y"], {"count": np.array(3)})
    (layer,) = layers_in(model)
    assert (layer.name, layer.refusal, layer.macs) == ("inner", None, None)
    written = replaced(model, "svd", (7,), check=False)  # the output has no shape, as before
    assert [n.op_type for n in written.graph.node[0].attribute[0].g.node][:2] == ["MatMul"] * 2
    x = RNG.standard_normal((4, 7)).astype(np.float32)
    assert relative(run(model, {"x": x})[0], run(written, {"x": x})[0]) < 1e-5


def test_conv_transpose_macs_count_its_inputs() -> None:
    (layer,) = layers_in(transposed_conv())
    assert layer.kind == "conv-transpose"
    assert layer.macs == 8 * 25 * 6 * 9


def test_a_weight_that_is_an_output_is_kept() -> None:
    model = make_model([node("MatMul", ["x", "w"], "y")], X, ["y"], {"w": W})
    model.graph.output.append(onnx.helper.make_tensor_value_info("w", 1, [7, 5]))
    assert layers_in(model)[0].refusal == "the weight is also an output of the graph"


def test_indices_and_products_of_activations_are_no_layers() -> None:
    model = make_model(
        [
            node("Shape", ["x"], "s"),
            node("Gather", ["s", "i"], "d"),
            node("Transpose", ["x"], "t"),
            node("MatMul", ["x", "t"], "y"),
        ],
        X,
        ["y"],
        {"i": np.array([0])},
    )
    assert layers_in(model) == ()


def test_equal_node_names_fall_back_to_the_weight_s() -> None:
    model = make_model(
        [node("MatMul", ["x", "w"], "a", "fc"), node("MatMul", ["a", "v"], "y", "fc")],
        X,
        ["y"],
        {"w": W, "v": W.T.copy()},
    )
    assert [layer.name for layer in layers_in(model)] == ["w", "v"]


def test_a_name_that_is_taken_is_numbered() -> None:
    nodes = [node("MatMul", ["x", "v"], "a", "w"), node("MatMul", ["a", "w"], "y")]
    layers = layers_in(make_model(nodes, X, ["y"], {"w": W.T.copy(), "v": W}))
    assert [layer.name for layer in layers] == ["w", "w_1"]


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ([onnx.TensorProto.INT64, onnx.TensorProto.FLOAT], "a Cast to int64 on the way"),
        ([onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT], "a Cast to float16 on the way"),
        ([onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT], None),
    ],
)
def test_casts_that_round_are_no_views(to: list[int], reason: str | None) -> None:
    nodes = [
        node("Cast", ["w"], "a", to=to[0]),
        node("Cast", ["a"], "b", to=to[1]),
        node("MatMul", ["x", "b"], "y"),
    ]
    (layer,) = layers_in(make_model(nodes, X, ["y"], {"w": W}))
    assert (layer.refusal or "").startswith(reason or "")
    assert (layer.refusal is None) == (reason is None)


def test_long_chains_of_views_need_no_recursion() -> None:
    names = ["w", *(f"v{i}" for i in range(3000))]
    nodes = [node("Identity", [a], b) for a, b in pairwise(names)]
    nodes.append(node("MatMul", ["x", names[-1]], "y"))
    model = make_model(nodes, X, ["y"], {"w": W})
    assert layers_in(model)[0].refusal is None
    assert len(replaced(model, "svd", (2,)).graph.node) == 2
