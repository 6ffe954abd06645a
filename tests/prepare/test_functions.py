"""Local functions: weights in them, and weights that are handed to them."""

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.errors import ModelError
from onnxlr.model.load import load
from onnxlr.prepare.functions import inline_functions
from tests.support.builders import Array, low_rank, make_model, node, relative, run

OPSET = onnx.helper.make_opsetid("", 17)
W = low_rank(np.random.default_rng(0), 32, 32, 4)


def function(
    name: str, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str] = ("a",), opset: int = 17
) -> onnx.FunctionProto:
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("local", 1)]
    return onnx.helper.make_function("local", name, list(inputs), ["b"], list(nodes), imports)


def call(name: str, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    return onnx.helper.make_node(name, list(inputs), [output], domain="local")


def dense(weight: Array = W) -> onnx.FunctionProto:
    inside = onnx.helper.make_node(
        "Constant", [], ["inside"], value=onnx.numpy_helper.from_array(weight)
    )
    return function("Dense", [inside, node("MatMul", ["a", "inside"], "b")])


def calls(*functions: onnx.FunctionProto, weights: dict[str, Array]) -> onnx.ModelProto:
    """Two calls of the last function in a row."""
    name, more = functions[-1].name, list(weights)
    nodes = [call(name, ["x", *more], "h"), node("Relu", ["h"], "r"), call(name, ["r", *more], "y")]
    inputs = {"x": (4, 32)}
    return make_model(nodes, inputs, ["y"], weights, functions=functions)


@pytest.mark.parametrize(
    ("functions", "weights"),
    [
        ((dense(),), {}),
        ((function("Pass", [node("MatMul", ["a", "c"], "b")], ("a", "c")),), {"w": W}),
        ((dense(), function("Outer", [call("Dense", ["a"], "b")])), {}),
    ],
    ids=["inside", "handed over", "nested"],
)
def test_a_weight_in_a_function_is_one_layer(
    functions: tuple[onnx.FunctionProto, ...], weights: dict[str, Array]
) -> None:
    model = calls(*functions, weights=weights)
    result = onnxlr.optimize(model, rank="exact")
    (decision,) = result.plan.decisions
    assert (decision.decision, decision.rank) == ("svd", (4,))
    assert decision.macs_before == 2 * 4 * 32 * 32
    feed = {"x": np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)}
    assert relative(run(model, feed)[0], run(result.model, feed)[0]) < 1e-5
    assert not result.model.functions
    factors = [t for t in result.model.graph.initializer if "/svd" in t.name]
    assert [tuple(t.dims) for t in factors] == [(32, 4), (4, 32)]


def test_what_cannot_be_inlined_is_listed_with_the_reason() -> None:
    model = calls(dense(), weights={})
    model.functions[0].opset_import[0].version = 13
    (decision,) = onnxlr.optimize(model, rank="exact", verify="none").plan.decisions
    assert decision.decision == "keep"
    assert decision.reason == "in the local function 'Dense', which can't be inlined"


def test_a_call_may_leave_out_an_output() -> None:
    body = [node("Relu", ["a"], "b"), node("MatMul", ["a", "w"], "c")]
    both = onnx.helper.make_function("local", "Both", ["a", "w"], ["b", "c"], body, [OPSET])
    inner = onnx.helper.make_node("Both", ["a", "w"], ["", "unread"], domain="local")
    outer = function("Outer", [inner, node("Neg", ["unread"], "b")], ("a", "w"))
    half = onnx.helper.make_node("Both", ["h", "w"], ["", "y"], domain="local")
    nodes = [call("Outer", ["x", "w"], "h"), half]
    model = make_model(nodes, {"x": (4, 32)}, ["y"], {"w": W}, functions=[both, outer])
    result = onnxlr.optimize(model, rank=4, target="params", verify="none")
    assert result.plan.replaced
    x = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    (before,), (after,) = run(model, {"x": x}), run(result.model, {"x": x})
    assert relative(before, after) < 1e-4


def test_recursion_and_explosion_are_refused() -> None:
    """A function that calls itself, and thirty that each call the next twice."""
    endless = function("Endless", [call("Endless", ["a"], "b")])
    doubling = [function("F0", [node("Relu", ["a"], "b")])]
    for i in range(30):
        twice = [call(f"F{i}", ["a"], "h"), call(f"F{i}", ["h"], "b")]
        doubling.append(function(f"F{i + 1}", twice))
    for functions in ((endless,), tuple(doubling)):
        model = onnx.ModelProto()
        model.CopyFrom(make_model([node("Relu", ["x"], "y")], {"x": (4, 32)}, ["y"], {}))
        model.functions.extend(functions)
        model.opset_import.append(onnx.helper.make_opsetid("local", 1))
        model.graph.node.insert(0, call(functions[-1].name, ["x"], "h"))
        with pytest.raises(ModelError, match=r"calls itself|1,000,000 nodes"):
            load(model)


def test_a_deep_nest_is_inlined() -> None:
    """Twelve hundred functions, each calling the next: deeper than Python's stack."""
    functions = [function("F0", [node("Relu", ["a"], "b")])]
    functions += [function(f"F{i}", [call(f"F{i - 1}", ["a"], "b")]) for i in range(1, 1200)]
    model = make_model([node("Relu", ["x"], "y")], {"x": (4, 32)}, ["y"], {})
    model.functions.extend(functions)
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    model.graph.node.insert(0, call("F1199", ["x"], "h"))
    inlining = inline_functions(load(model).model)
    assert inlining.model is not None
    assert inlining.refusal is None


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        ((function("F0", [node("Relu", ["a"], "b")], opset=11),), "inlining its functions fails: "),
        (
            (
                function("F0", [node("Relu", ["a"], "b")]),
                *(
                    function(name, [call(last, ["a"], "h"), call(last, ["h"], "b")])
                    for last, name in itertools.pairwise(f"F{i}" for i in range(19))
                ),
            ),
            "inlining its functions would make ",
        ),
    ],
    ids=["another opset", "too many nodes"],
)
def test_functions_that_stay_have_their_reason(
    functions: tuple[onnx.FunctionProto, ...], reason: str
) -> None:
    model = make_model([node("Relu", ["x"], "y")], {"x": (4, 32)}, ["y"], {})
    model.functions.extend(functions)
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    model.graph.node.insert(0, call(functions[-1].name, ["x"], "h"))
    graph = load(model).model
    inlining = inline_functions(graph)
    assert inlining.model is graph
    assert (inlining.refusal or "").startswith(reason)


def test_a_model_without_functions_needs_no_reason() -> None:
    graph = load(make_model([node("Relu", ["x"], "y")], {"x": (4, 32)}, ["y"], {})).model
    inlining = inline_functions(graph)
    assert inlining.model is graph
    assert inlining.refusal is None
