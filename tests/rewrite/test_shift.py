"""Where the mean of what factors lose goes: into the bias behind, or an Add of its own."""

import numpy as np
import pytest

from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.registry import choose_passes
from onnxlr.model.protobuf import to_proto
from onnxlr.rewrite.replace import rewrite
from tests.support.builders import layers_of, make_model, node, run


@pytest.mark.parametrize("order", [("h", "b"), ("b", "h")])
def test_the_bias_behind_a_matmul_takes_up_the_shift(order: tuple[str, str]) -> None:
    """No further Add is written, and another Add of the same vector keeps it."""
    rng = np.random.default_rng(0)
    w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (5,)))
    nodes = [
        node("MatMul", ["x", "w"], "h", "fc"),
        node("Add", order, "y"),
        node("Relu", ["x2"], "r"),
        node("Add", ["r", "b"], "z"),
    ]
    model = make_model(nodes, {"x": (3, 6), "x2": (3, 5)}, ["y", "z"], {"w": w, "b": b})
    source, shapes, _ = layers_of(model)
    shift = rng.standard_normal(5)
    factored = Factored((w, np.eye(5)), shift)
    changed = to_proto(
        rewrite(source, shapes, {"fc": Choice(choose_passes(("svd",))[0], (5,))}, {"fc": factored})
    )
    assert [n.op_type for n in changed.graph.node] == ["MatMul", "MatMul", "Add", "Relu", "Add"]
    x, x2 = rng.standard_normal((3, 6)), rng.standard_normal((3, 5))
    feed = {"x": x.astype(np.float32), "x2": x2.astype(np.float32)}
    (y, z), (y_new, z_new) = run(model, feed), run(changed, feed)
    np.testing.assert_allclose(y_new, y + shift, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(z_new, z)


@pytest.mark.parametrize("case", ["fed", "read twice", "an output", "a number"])
def test_where_no_vector_is_added_the_shift_is_an_add_of_its_own(case: str) -> None:
    rng = np.random.default_rng(0)
    w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (5,)))
    nodes = [node("MatMul", ["x", "w"], "h", "fc"), node("Add", ["h", "b"], "y")]
    inputs: dict[str, tuple[int, ...]] = {"x": (3, 6)}
    outputs, weights = ["y"], {"w": w, "b": b[:1].reshape(()) if case == "a number" else b}
    if case == "fed":
        inputs["b"] = (5,)
        del weights["b"]
    if case == "read twice":
        nodes.append(node("Relu", ["h"], "z"))
        outputs.append("z")
    if case == "an output":
        outputs.append("h")
    model = make_model(nodes, inputs, outputs, weights)
    source, shapes, _ = layers_of(model)
    shift = rng.standard_normal(5)
    choice = Choice(choose_passes(("svd",))[0], (5,))
    changed = to_proto(
        rewrite(source, shapes, {"fc": choice}, {"fc": Factored((w, np.eye(5)), shift)})
    )
    assert [n.op_type for n in changed.graph.node][:4] == ["MatMul", "MatMul", "Add", "Add"]
    feed = {"x": rng.standard_normal((3, 6)).astype(np.float32)} | (
        {"b": b} if case == "fed" else {}
    )
    np.testing.assert_allclose(
        run(changed, feed)[0], run(model, feed)[0] + shift, rtol=1e-5, atol=1e-5
    )
