"""Folding weights: chains of constants become what a layer multiplies by, and no file grows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxlr
from onnxlr.layers.layer import Layer
from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.fold_weights import fold_weights
from tests.support.builders import Array, low_rank, make_model, node, relative, run

RNG = np.random.default_rng(0)
W = RNG.standard_normal((12, 8)).astype(np.float32)
V = RNG.standard_normal((8, 12)).astype(np.float32)
HALF = np.array([0.5], np.float32)
X = {"x": (4, 12)}
FEED: dict[str, Array] = {
    "x": RNG.standard_normal((4, 12)).astype(np.float32),
    "j": np.array([3, 1, 4], np.float32),
}


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def product(chain: list[Any], weights: Mapping[str, Array], **settings: Any) -> onnx.ModelProto:
    """``x @ v``, with v computed by the chain."""
    return make_model(
        [*chain, node("MatMul", ["x", "v"], "y", "fc")], X, ["y"], weights, **settings
    )


def folded(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A model after folding, with the same outputs and no larger, and what was folded."""
    graph = load(model).model
    count = fold_weights(graph)
    result = to_proto(graph)
    onnx.checker.check_model(result)
    feed = {k: v for k, v in FEED.items() if k in [i.name for i in model.graph.input]}
    for before, after in zip(run(model, feed), run(result, feed), strict=True):
        assert relative(before, after) < 1e-6
    assert stored_bytes(result) <= stored_bytes(model)
    return result, count


def stored_bytes(model: onnx.ModelProto) -> int:
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer)


def operators(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize(
    ("chain", "weights", "opset"),
    [
        ([node("Reshape", ["w", "s"], "v")], {"w": W.reshape(3, 32), "s": ints(12, -1)}, 17),
        ([node("Squeeze", ["w"], "v", axes=[0])], {"w": W[None]}, 11),
        ([node("Unsqueeze", ["w", "s"], "v")], {"w": W, "s": ints(0)}, 13),
        ([node("Unsqueeze", ["w"], "v", axes=[0])], {"w": W}, 12),
        ([node("Flatten", ["w"], "v", axis=1)], {"w": W.reshape(12, 4, 2)}, 17),
        ([node("Slice", ["w", "a", "b"], "v")], {"w": W, "a": ints(0), "b": ints(12)}, 17),
        ([node("Slice", ["w"], "v", starts=[0], ends=[12])], {"w": W}, 9),
        ([node("Concat", ["w", "u"], "v", axis=1)], {"w": W[:, :5], "u": W[:, 5:]}, 17),
        ([node("Gather", ["w", "i"], "v")], {"w": W, "i": ints(*range(11, -1, -1))}, 17),
        (
            [node("Transpose", ["w"], "t"), node("Reshape", ["t", "s"], "v")],
            {"w": W.reshape(4, 24), "s": ints(12, 8)},
            17,
        ),
        ([node("Mul", ["w", "g"], "v")], {"w": W, "g": RNG.random((1, 8)).astype(np.float32)}, 17),
        ([node("Mul", ["w", "g"], "v")], {"w": W, "g": np.float32(1.7)}, 7),
        (
            [
                node("ReduceL2", ["w"], "n", axes=[0], keepdims=1),
                node("Div", ["w", "n"], "u"),
                node("Mul", ["u", "g"], "v"),
            ],
            {"w": W, "g": RNG.random((1, 8)).astype(np.float32)},
            13,
        ),
        ([node("LpNormalization", ["w"], "v", axis=0)], {"w": W}, 17),
        (
            [
                node("Shape", ["w"], "s"),
                node("ReduceSumSquare", ["w", "a"], "q", keepdims=1),
                node("Sqrt", ["q"], "n"),
                node("Expand", ["n", "s"], "e"),
                node("Div", ["w", "e"], "v"),
            ],
            {"w": W, "a": ints(1)},
            18,
        ),
        (  # a constant of real numbers that a list of sizes makes
            [
                node("ConstantOfShape", ["a"], "c", value=numpy_helper.from_array(HALF)),
                node("Mul", ["c", "w"], "v"),
            ],
            {"w": W, "a": ints(12, 8)},
            17,
        ),
        (  # an adapter that was left beside its weight
            [
                node("MatMul", ["a", "b"], "d"),
                node("Mul", ["d", "scale"], "s"),
                node("Add", ["w", "s"], "v"),
            ],
            {"w": W, "a": W[:, :2].copy(), "b": W[:2].copy(), "scale": np.float32(0.5)},
            17,
        ),
    ],
)
def test_chains(chain: list[Any], weights: dict[str, Array], opset: int) -> None:
    result, count = folded(product(chain, weights, opset=opset))
    assert (operators(result), count, len(result.graph.initializer)) == (["MatMul"], 1, 1)


def test_the_parts_of_a_packed_weight_are_folded_together() -> None:
    chain = [
        onnx.helper.make_node("Split", ["w", "s"], ["q", "k", "v"], axis=1),
        *(node("MatMul", ["x", p], f"{p}x", f"{p}_proj") for p in "qkv"),
        node("Concat", ["qx", "kx", "vx"], "y", axis=1),
    ]
    model = make_model(chain, X, ["y"], {"w": W, "s": ints(4, 2, 2)})
    result, count = folded(model)
    assert (operators(result), count) == (["MatMul"] * 3 + ["Concat"], 3)
    assert stored_bytes(result) == W.nbytes


def test_a_part_that_is_no_weight_goes_with_them() -> None:
    """The bias beside the kernel, and one in the body of a branch."""
    chain = [
        node("Slice", ["w", "zero", "two", "zero"], "b2"),
        node("Slice", ["w", "two", "end", "zero"], "v"),
        node("Reshape", ["b2", "flat"], "b"),
        node("MatMul", ["x", "v"], "xv", "fc"),
        node("Add", ["xv", "b"], "y"),
    ]
    weights = {"w": np.vstack([W[:1], W[:1], W]), "zero": ints(0), "two": ints(2), "end": ints(14)}
    weights["flat"] = ints(2, 1, 8)
    chain[-1] = node("Sub", ["xv", "bm"], "y")
    chain.insert(3, node("ReduceMax", ["b"], "bm", axes=[0, 1], keepdims=0))
    result, count = folded(make_model(chain, X, ["y"], weights))
    assert (operators(result), count) == (["MatMul", "Sub"], 2)


def growing_cases() -> dict[str, onnx.ModelProto]:
    elsewhere = [
        node("ReduceSum", ["x"], "total", keepdims=0),
        node("Mul", ["w", "total"], "scaled", "elsewhere"),
        node("ReduceSum", ["scaled"], "t", keepdims=0),
        node("MatMul", ["x", "v"], "xv", "fc"),
        node("Add", ["xv", "t"], "y"),
    ]
    shared = [node("Reshape", ["w", "s"], "v"), *elsewhere]
    one_part = [node("Slice", ["w", "a", "b"], "v"), *elsewhere]
    return {
        "read whole elsewhere": make_model(
            shared, X, ["y"], {"w": W.reshape(8, 12), "s": ints(12, 8)}, opset=12
        ),
        "a part of what is read whole": make_model(
            one_part, X, ["y"], {"w": np.vstack([W, W]), "a": ints(0), "b": ints(12)}, opset=12
        ),
        "expanded": product([node("Expand", ["w", "s"], "v")], {"w": W[:1], "s": ints(12, 8)}),
        "an outer product": product(
            [node("Mul", ["a", "b"], "v")], {"a": W[:, :1].copy(), "b": W[:1].copy()}
        ),
        "factors": product(
            [node("MatMul", ["a", "b"], "v")], {"a": W[:, :2].copy(), "b": W[:2].copy()}
        ),
        "gathered twice": product(
            [node("Gather", ["w", "i"], "v")], {"w": W[:6], "i": ints(*[0, 1, 2, 3, 4, 5] * 2)}
        ),
    }


@pytest.mark.parametrize("name", growing_cases())
def test_what_would_make_the_file_larger_stays(name: str) -> None:
    model = growing_cases()[name]
    result, count = folded(model)
    assert (operators(result), count) == (operators(model), 0)
    (layer,) = (item.layer for item in onnxlr.inspect(model))
    assert "from constants, and would make the file larger" in reason_of(layer)


def reason_of(layer: Layer) -> str:
    return layer.refusal or ""


def test_a_chain_that_is_an_output_too_or_may_be_fed_stays() -> None:
    chain = [node("Reshape", ["w", "s"], "v"), node("MatMul", ["x", "v"], "y", "fc")]
    weights = {"w": W.reshape(8, 12), "s": ints(12, 8)}
    assert folded(make_model(chain, X, ["y", "v"], weights))[1] == 0
    fed = make_model(chain, {**X, "w": (8, 12)}, ["y"], weights)
    assert fold_weights(load(fed).model) == 0
    fed.ir_version = 3  # there all initializers are inputs, and no value may be fed
    fed.opset_import[0].version = 8
    fed.graph.input.append(onnx.helper.make_tensor_value_info("s", 7, [2]))
    assert fold_weights(load(fed).model) == 1


def test_what_is_not_finite_stays() -> None:
    chain = [node("Div", ["w", "g"], "v")]
    model = product(chain, {"w": W, "g": np.zeros((1, 8), np.float32)})
    assert fold_weights(load(model).model) == 0


@pytest.mark.parametrize("to", [8, 2**40])
def test_a_cast_to_what_holds_no_numbers_stays(to: int) -> None:
    chain = [node("Cast", ["w"], "c", to=to), node("Reshape", ["c", "s"], "v")]
    chain += [node("MatMul", ["x", "v"], "y", "fc")]
    graph = onnx.helper.make_graph(
        chain,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [4, 12])],
        [onnx.helper.make_tensor_value_info("y", 1, [4, 8])],
        [onnx.numpy_helper.from_array(a, n) for n, a in (("w", W), ("s", ints(12, 8)))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    assert fold_weights(load(model).model) == 0


def test_quantized_weights_behind_more_nodes_stay() -> None:
    chain = [
        node("DequantizeLinear", ["q", "scale"], "d"),
        node("Reshape", ["d", "s"], "v"),
    ]
    weights: dict[str, Array] = {"q": np.ones((8, 12), np.int8), "s": ints(12, 8)}
    weights["scale"] = np.array(0.1, np.float32)
    model = product(chain, weights)
    assert folded(model)[1] == 0
    (layer,) = (item.layer for item in onnxlr.inspect(model))
    assert reason_of(layer) == "the weight is quantized (DequantizeLinear): left alone"


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_half_precision_that_is_cast_stays_half(dtype: Any) -> None:
    kind = onnx.TensorProto.FLOAT16 if dtype is np.float16 else onnx.TensorProto.BFLOAT16
    chain = [node("Cast", ["w"], "c", to=1), node("Reshape", ["c", "s"], "v")]
    model = product(chain, {"s": ints(12, 8)})
    array = W.astype(onnx.helper.tensor_dtype_to_np_dtype(kind)).reshape(8, 12)
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    graph = load(model).model
    assert fold_weights(graph) == 1
    result = to_proto(graph)
    (weight,) = result.graph.initializer
    assert (operators(result), weight.data_type) == (["Cast", "MatMul"], kind)
    after = onnx.numpy_helper.to_array(weight).astype(np.float32)
    np.testing.assert_array_equal(after, array.astype(np.float32).reshape(12, 8))


def test_half_precision_is_computed_in_double() -> None:
    """A norm whose square is beyond what half precision holds."""
    chain = [node("ReduceL2", ["w"], "n", axes=[0], keepdims=1), node("Div", ["w", "n"], "v")]
    weight = (W * 200).astype(np.float16)
    model = make_model(
        [*chain, node("MatMul", ["x", "v"], "y")], X, ["y"], {"w": weight}, dtype="float16"
    )
    graph = load(model).model
    assert fold_weights(graph) == 1
    after = onnx.numpy_helper.to_array(to_proto(graph).graph.initializer[0]).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(after, axis=0), 1.0, rtol=1e-3)


def test_weights_in_a_body_and_convolutions_and_tables() -> None:
    kernel = RNG.standard_normal((8, 4, 1, 3)).astype(np.float32)
    chain = [
        node("Cast", ["j"], "i", to=7),
        node("Reshape", ["t", "ts"], "table"),
        node("Gather", ["table", "i"], "e", "lookup"),
        node("Squeeze", ["k", "two"], "k3"),
        node("Conv", ["e", "k3"], "y", "conv"),
    ]
    weights = {"t": RNG.standard_normal((20, 24)).astype(np.float32), "ts": ints(20, 4, 6)}
    weights |= {"k": kernel, "two": ints(2)}
    result, count = folded(make_model(chain, {"j": (3,)}, ["y"], weights))
    assert (operators(result), count) == (["Cast", "Gather", "Conv"], 2)

    branch = onnx.helper.make_graph(
        [node("Reshape", ["w", "s"], "v"), node("MatMul", ["x", "v"], "o")],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("o", 1, [4, 8])],
    )
    both = {"then_branch": branch, "else_branch": branch}
    gate = onnx.helper.make_node("If", ["c"], ["y"], **both)
    weights = {"w": W.reshape(8, 12), "s": ints(12, 8), "c": np.array(True)}
    model = make_model([gate], X, ["y"], weights)
    second = model.graph.node[0].attribute[0].g
    for inner in second.node:
        for values in (inner.input, inner.output):
            values[:] = [{"v": "v2", "o": "o2"}.get(n, n) for n in values]
    second.output[0].name = "o2"
    result, count = folded(model)
    assert count == 0  # each branch would store the weight once more


def test_optimize_replaces_them_and_writes_what_fits() -> None:
    weight = low_rank(RNG, 64, 64, 3)
    chain = [node("Reshape", ["w", "s"], "v"), node("MatMul", ["x", "v"], "y", "fc")]
    model = make_model(
        chain, {"x": (4, 64)}, ["y"], {"w": weight.reshape(16, 256), "s": ints(64, 64)}
    )
    result = onnxlr.optimize(model, rank="exact", max_drop=1.0)
    (decision,) = result.plan.decisions
    assert (decision.decision, decision.rank) == ("svd", (3,))
    feed = {"x": RNG.standard_normal((4, 64)).astype(np.float32)}
    assert relative(run(model, feed)[0], run(result.model, feed)[0]) < 1e-5


@pytest.mark.parametrize(("weight", "name"), [("w", "node_MatMul_7"), ("a.0.weight", "a.0.weight")])
def test_a_folded_weight_is_called_as_it_was(weight: str, name: str) -> None:
    chain = [node("Reshape", [weight, "s"], "v"), node("MatMul", ["x", "v"], "y", "node_MatMul_7")]
    model = make_model(chain, X, ["y"], {weight: W.reshape(8, 12), "s": ints(12, 8)})
    assert [row.layer.name for row in onnxlr.inspect(model)] == [name]
