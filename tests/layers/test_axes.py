"""The number of axes of values, where it holds for all that may be fed; chains for all sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxlr
from onnxlr.layers.axes import axis_counts
from tests.support.builders import low_rank, make_model, node, run
from tests.support.node_tests import node_tests

RNG = np.random.default_rng(11)
CONSTANTS = {
    "pair": np.array([-1, 64]),
    "first": np.array(0),
    "one": np.array([1]),
    "minus": np.array([-1]),
    "zero": np.float32(0),
    "table": np.zeros((9, 4), np.float32),
}


@pytest.mark.parametrize(
    ("nodes", "dims", "count"),
    [
        ([("Squeeze", ["x"])], ["n", 64], None),
        ([("Squeeze", ["x"])], [1, 64], None),
        ([("Squeeze", ["x", "one"])], ["n", 1], 1),
        ([("Squeeze", ["x", "k"])], ["n", 1], None),
        ([("Unsqueeze", ["x", "one"])], ["n", 64], 3),
        ([("Squeeze", ["x"]), ("Relu", ["v0"])], ["n", 64], None),
        ([("Squeeze", ["x"]), ("Add", ["v0", "x"])], ["n", 64], None),
        ([("Squeeze", ["x"]), ("Reshape", ["v0", "pair"])], ["n", 64], 2),
        ([("Squeeze", ["x"]), ("Flatten", ["v0"])], ["n", 64], 2),
        ([("Shape", ["x"]), ("Reshape", ["x", "v0"])], ["n", 64], 2),
        ([("Squeeze", ["x"]), ("Shape", ["v0"]), ("Reshape", ["x", "v1"])], ["n", 64], None),
        ([("Squeeze", ["x"]), ("Shape", ["v0"]), ("ConstantOfShape", ["v1"])], ["n", 64], None),
        ([("Squeeze", ["x"]), ("Expand", ["v0", "minus"])], ["n", 64], None),
        ([("Expand", ["one", "pair"])], ["n", 64], 2),
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
            2,
        ),
        # A squeeze written out.
        (
            [
                ("Shape", ["x"]),
                ("Equal", ["v0", "one"]),
                ("Not", ["v1"]),
                ("Compress", ["v0", "v2"], {"axis": 0}),
                ("Reshape", ["x", "v3"]),
            ],
            ["n", 64],
            None,
        ),
        ([("NonZero", ["x"]), ("Squeeze", ["v0"])], [64], None),
        ([("NonZero", ["x"]), ("Transpose", ["v0"])], ["n", 64], 2),
        ([("ReduceSum", ["x", "k"], {"keepdims": 0})], ["n", 64], None),
        ([("ReduceSum", ["x", "one"], {"keepdims": 0})], ["n", 64], 1),
        ([("ReduceSum", ["x", "k"])], ["n", 64], 2),
        ([("ReduceMean", ["x"], {"keepdims": 0, "axes": [0, 1]})], ["n", 64], 0),
        ([("ReduceMean", ["x"], {"keepdims": 0, "axes": [1, -2]})], ["n", "m", 64], 2),
        ([("Squeeze", ["x", "three"])], ["n", 1], None),
        ([("ReduceMax", ["x"], {"keepdims": 0})], ["n", 64], 0),
        ([("ArgMax", ["x"], {"keepdims": 0})], ["n", 64], 1),
        ([("Cast", ["x"], {"to": 7}), ("Gather", ["table", "v0"])], ["n", "t", 2], 4),
        ([("Compress", ["x", "yes"])], ["n", 64], None),
        ([("Reshape", ["x", "k"])], ["n", 64], None),
        ([("MatMul", ["x", "x"])], [64], 0),
        ([("MatMul", ["x", "table"])], [9], 1),
        ([("MatMul", ["x", "table"])], ["b", "n", 9], 3),
        ([("Gelu", ["x"], {"domain": "somebody's"})], ["n", 64], None),
    ],
)
def test_what_is_counted(nodes: list[tuple[Any, ...]], dims: list[Any], count: int | None) -> None:
    built = [
        onnx.helper.make_node(op, inputs, [f"v{i}"], **(more[0] if more else {}))
        for i, (op, inputs, *more) in enumerate(nodes)
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        built,
        "net",
        [info("x", 1, dims), info("k", 7, ["k"]), info("yes", 9, ["m"]), info("three", 7, [3])],
        [],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in CONSTANTS.items()],
    )
    model = ir.from_proto(onnx.helper.make_model(graph))
    counts = {v.name: axes for v, axes in axis_counts(model.graph).items()}
    assert counts.get(f"v{len(nodes) - 1}") == count


def test_what_is_counted_is_so_for_every_operator_there_is() -> None:
    """The count is that of the outputs which the tests of the standard expect."""
    told = 0
    for case in node_tests():
        graph = ir.from_proto(case.model).graph
        counts = {v.name: n for v, n in axis_counts(graph).items()}
        for _, outputs in case.data_sets:
            for info, expected in zip(case.model.graph.output, outputs, strict=True):
                if info.name in counts and isinstance(expected, np.ndarray | np.generic):
                    assert counts[info.name] == expected.ndim, case.name
                    told += 1
    assert told > 900


def squeezed_lookup(shape: tuple[int, ...], axis: int) -> onnx.ModelProto:
    """A table of rank 3 that is looked up along an axis by indices without axes of one."""
    table = np.moveaxis(low_rank(RNG, 40, 64, 3).reshape(40, *shape), 0, axis)
    nodes = [
        node("Cast", ["x"], "i", to=7),
        node("Squeeze", ["i"], "j"),
        node("Gather", ["w", "j"], "y", axis=axis),
    ]
    return make_model(nodes, {"x": ["n", "t"]}, ["y"], {"w": table.copy()})


def found_lookup() -> onnx.ModelProto:
    """A table that is looked up at the places of a mask, which may be one place only."""
    nodes = [
        node("Greater", ["x", "limit"], "b"),
        node("NonZero", ["b"], "k"),
        node("Squeeze", ["k"], "j"),
        node("Gather", ["w", "j"], "y", axis=1),
    ]
    table = low_rank(RNG, 64, 40, 3)
    return make_model(nodes, {"x": [40]}, ["y"], {"w": table, "limit": np.array(38, np.float32)})


def squeezed_product(left: bool) -> onnx.ModelProto:
    """A stack of matrices, or one on the left, that meets a matrix or, of one row, a vector."""
    weight = low_rank(RNG, 64, 64, 3)
    stack = weight if left else np.stack([weight, weight.T])
    inputs = ["w", "j"] if left else ["j", "w"]
    nodes = [node("Squeeze", ["x"], "j"), node("MatMul", inputs, "y")]
    return make_model(nodes, {"x": ["n", 64] if not left else [64, "n"]}, ["y"], {"w": stack})


def compressed_product() -> onnx.ModelProto:
    """The product of ``squeezed_product``, with Compress in place of Squeeze."""
    weight = low_rank(RNG, 64, 64, 3)
    nodes = [
        node("Shape", ["x"], "s"),
        node("Equal", ["s", "one"], "q"),
        node("Not", ["q"], "nq"),
        node("Compress", ["s", "nq"], "t", axis=0),
        node("Reshape", ["x", "t"], "j"),
        node("MatMul", ["j", "w"], "y"),
    ]
    constants = {"w": np.stack([weight, weight.T]), "one": np.array([1])}
    return make_model(nodes, {"x": ["n", "m", 64]}, ["y"], constants)


def recurrent_scan(lookup: bool) -> onnx.ModelProto:
    """h = tanh(a + h·U) over steps, in a body that declares no shape of what it gives."""
    info = onnx.helper.make_tensor_value_info
    first = [node("MatMul", ["i", "w"], "a")]
    if lookup:
        first = [
            node("Gather", ["w", "i"], "e", axis=1),
            node("Transpose", ["e"], "a", perm=[1, 0]),
        ]
    body = onnx.helper.make_graph(
        [
            *first,
            node("MatMul", ["h", "u"], "b"),
            node("Add", ["a", "b"], "s"),
            node("Tanh", ["s"], "ho"),
            node("Relu", ["ho"], "o"),
        ],
        "step",
        [info("h", 1, ["n", 64]), info("i", 7 if lookup else 1, ["n"] if lookup else ["n", 64])],
        [info("ho", 1, None), info("o", 1, None)],
    )
    scan = onnx.helper.make_node("Scan", ["h0", "steps"], ["hn", "y"], body=body, num_scan_inputs=1)
    weights = {"w": low_rank(RNG, 64, 64, 4), "u": low_rank(RNG, 64, 64, 4)}
    graph = onnx.helper.make_graph(
        [node("Cast", ["x"], "steps", to=7) if lookup else node("Relu", ["x"], "steps"), scan],
        "net",
        [info("x", 1, ["t", "n"] if lookup else ["t", "n", 64]), info("h0", 1, ["n", 64])],
        [info("y", 1, None)],
        [onnx.numpy_helper.from_array(a, name) for name, a in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 12)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=7)


@pytest.mark.parametrize("method", ["auto", "tiled-svd"])
@pytest.mark.parametrize("lookup", [False, True])
def test_a_body_says_how_many_axes_it_gives(lookup: bool, method: str) -> None:
    """Runtimes need to know it where nothing is optimized."""
    model = recurrent_scan(lookup)
    rank = "4,2,2" if method == "tiled-svd" else 4
    result = onnxlr.optimize(
        model, method=method, rank=rank, target="params", verify="none", measure=False
    )
    assert result.plan.replaced
    x = np.asarray(RNG.integers(0, 64, (3, 5) if lookup else (3, 5, 64)), np.float32)
    feed = {"x": x if lookup else x / 64, "h0": np.zeros((5, 64), np.float32)}
    for optimized in (False, True):
        (before,), (after,) = (run(m, feed, optimized=optimized) for m in (model, result.model))
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "method", "sizes"),
    [
        (squeezed_lookup((8, 8), 1), "embedding-svd", [(1, 5), (2, 5), (1, 1)]),
        (squeezed_lookup((64,), 1), "embedding-svd", [(1, 5), (2, 5), (1, 1)]),
        (squeezed_lookup((64,), 0), "embedding-svd", [(1, 5), (2, 5), (1, 1)]),
        (found_lookup(), "embedding-svd", [(40,), (40,), (40,)]),
        (squeezed_product(False), "svd", [(3, 64), (1, 64)]),
        (compressed_product(), "svd", [(2, 3, 64), (1, 3, 64), (1, 1, 64)]),
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
    """The output accepts all sizes that the original does, whatever sizes were looked at."""
    onnx.save(model, tmp_path / "in.onnx")
    rank = "3,2,2" if method == "tiled-svd" else 3
    shape = ["x:" + ",".join(map(str, sizes[first]))]
    result = onnxlr.optimize(
        tmp_path / "in.onnx", method=method, rank=rank, target="params", shape=shape, max_drop=1
    )
    for i, size in enumerate(sizes):
        feed = {"x": RNG.integers(0, 40, size).astype(np.float32)}
        if size == (40,):  # one, several, none
            feed["x"][:] = 0
            feed["x"][: (1, 9, 0)[i]] = 39
        for before, after in zip(run(model, feed), run(result.model, feed), strict=True):
            assert after.shape == before.shape
            np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-2)
