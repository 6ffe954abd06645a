"""Values whose number of axes hangs on the sizes that are fed."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxlr
from onnxlr.axes import open_axes
from tests.builders import low_rank, make_model, node, run

RNG = np.random.default_rng(11)
SIZES = {
    "pair": np.array([-1, 64]),
    "first": np.array(0),
    "one": np.array([1]),
    "minus": np.array([-1]),
}


def branch(name: str, shape: list[Any] | None) -> onnx.GraphProto:
    """The body of an If that gives x, with or without a declared shape."""
    out = onnx.helper.make_tensor_value_info(name, 1, shape)
    return onnx.helper.make_graph([node("Identity", ["x"], name)], name, [], [out])


@pytest.mark.parametrize(
    ("nodes", "dims", "is_open"),
    [
        ([("Squeeze", ["x"])], ["n", 64], True),
        ([("Squeeze", ["x"])], [1, 64], False),
        ([("Squeeze", ["x", "one"])], ["n", 1], False),
        ([("Squeeze", ["x"]), ("Relu", ["v0"])], ["n", 64], True),
        ([("Squeeze", ["x"]), ("Reshape", ["v0", "pair"])], ["n", 64], False),
        ([("Squeeze", ["x"]), ("Flatten", ["v0"])], ["n", 64], False),
        ([("Squeeze", ["x"]), ("Shape", ["v0"]), ("Reshape", ["x", "v1"])], ["n", 64], True),
        (
            [
                ("Squeeze", ["x"]),
                ("Shape", ["v0"]),
                ("Concat", ["v1", "minus"], {"axis": 0}),
                ("Reshape", ["x", "v2"]),
            ],
            ["n", 64],
            True,
        ),
        (
            [
                ("Squeeze", ["x"]),
                ("Shape", ["v0"]),
                ("Gather", ["v1", "first"]),
                ("Unsqueeze", ["v2", "one"]),
                ("Concat", ["v3", "minus"], {"axis": 0}),
                ("Reshape", ["x", "v4"]),
            ],
            ["n", 64],
            False,
        ),
        ([("Shape", ["x"]), ("Reshape", ["x", "v0"])], ["n", 64], False),
        ([("Squeeze", ["x"]), ("Shape", ["v0"]), ("ConstantOfShape", ["v1"])], ["n", 64], True),
        ([("Squeeze", ["x"]), ("Expand", ["v0", "minus"])], ["n", 64], True),
        ([("Cast", ["x"], {"to": 7}), ("Reshape", ["minus", "v0"])], ["n"], True),
    ],
)
def test_what_is_open(nodes: list[tuple[Any, ...]], dims: list[Any], is_open: bool) -> None:
    built = []
    for i, (op, inputs, *more) in enumerate(nodes):
        built.append(node(op, inputs, f"v{i}", **(more[0] if more else {})))
    last = f"v{len(nodes) - 1}"
    model = make_model(built, {"x": dims}, [last], SIZES)
    graph = ir.from_proto(model).graph
    found = {value.name for value in open_axes(graph)}
    assert (last in found) == is_open


@pytest.mark.parametrize("shape", [None, ["n", 64]])
def test_branches_that_declare_their_axes(shape: list[Any] | None) -> None:
    bodies = {"then_branch": branch("t", shape), "else_branch": branch("e", shape)}
    out = onnx.helper.make_node("If", ["yes"], ["h"], **bodies)
    model = make_model([out], {"x": ["n", 64]}, ["h"], {"yes": np.array(True)})
    graph = ir.from_proto(model).graph
    graph.outputs[0].shape = None if shape is None else ir.Shape(shape)
    assert bool(open_axes(graph)) == (shape is None)


def squeezed_lookup(shape: tuple[int, ...], axis: int) -> onnx.ModelProto:
    """A table of rank 3 that is looked up along its second axis by indices without ones."""
    table = np.moveaxis(low_rank(RNG, 40, 64, 3).reshape(40, *shape), 0, axis)
    nodes = [
        node("Cast", ["x"], "i", to=7),
        node("Squeeze", ["i"], "j"),
        node("Gather", ["w", "j"], "y", axis=axis),
    ]
    return make_model(nodes, {"x": ["n", "t"]}, ["y"], {"w": table.copy()})


def squeezed_product(left: bool) -> onnx.ModelProto:
    """A stack of matrices, or one on the left, that meets a matrix or, of one row, a vector."""
    weight = low_rank(RNG, 64, 64, 3)
    stack = weight if left else np.stack([weight, weight.T])
    inputs = ["w", "j"] if left else ["j", "w"]
    nodes = [node("Squeeze", ["x"], "j"), node("MatMul", inputs, "y")]
    return make_model(nodes, {"x": ["n", 64] if not left else [64, "n"]}, ["y"], {"w": stack})


@pytest.mark.parametrize(
    ("model", "method", "sizes"),
    [
        (squeezed_lookup((8, 8), 1), "embedding-svd", [(1, 5), (2, 5), (1, 1)]),
        (squeezed_lookup((64,), 1), "embedding-svd", [(1, 5), (2, 5), (1, 1)]),
        (squeezed_lookup((64,), 0), "embedding-svd", [(1, 5), (2, 5), (1, 1)]),
        (squeezed_product(False), "svd", [(3, 64), (1, 64)]),
        (squeezed_product(True), "tiled-svd", [(64, 3), (64, 1)]),
        (squeezed_product(True), "svd", [(64, 3), (64, 1)]),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_sizes_that_change_the_axes(
    model: onnx.ModelProto,
    method: str,
    sizes: list[tuple[int, ...]],
    first: int,
    tmp_path: Path,
) -> None:
    """Whatever sizes were looked at, all that the original takes give what it gives."""
    onnx.save(model, tmp_path / "in.onnx")
    rank = "3,2,2" if method == "tiled-svd" else 3
    shape = ["x:" + ",".join(map(str, sizes[first]))]
    result = onnxlr.optimize(
        tmp_path / "in.onnx", method=method, rank=rank, target="params", shape=shape, max_drop=1
    )
    for size in sizes:
        feed = {"x": RNG.integers(0, 40, size).astype(np.float32)}
        for before, after in zip(run(model, feed), run(result.model, feed), strict=True):
            assert after.shape == before.shape
            np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-2)
