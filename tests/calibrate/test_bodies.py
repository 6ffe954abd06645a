"""Layers in bodies are fitted to what they are given there, in every iteration."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxlr.calibrate import statistics as statistics_module
from onnxlr.calibrate.statistics import Statistics
from onnxlr.model.lifting import lift
from onnxlr.model.load import load
from onnxlr.prepare.prepared import prepare
from onnxlr.system.session import Feed
from tests.support.builders import Array
from tests.support.calibration import calibrated

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)
W = (RNG.standard_normal((6, 6)) * 0.4).astype(np.float32)
V = (RNG.standard_normal((6, 6)) * 0.4).astype(np.float32)
KERNEL = (RNG.standard_normal((6, 6, 3)) * 0.2).astype(np.float32)


def info(name: str, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, None if kind == FLOAT else [])


def model(nodes: list[onnx.NodeProto], **weights: Array) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", FLOAT, [4, 6])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def branches() -> onnx.ModelProto:
    """An If whose branches multiply twice each: by w where the sum is positive, else by v."""
    bodies = [
        helper.make_graph(
            [
                helper.make_node("MatMul", ["x", f"{n}_w"], [f"{n}_h"], f"{n}_first"),
                helper.make_node("Tanh", [f"{n}_h"], [f"{n}_t"]),
                helper.make_node("MatMul", [f"{n}_t", f"{n}_w2"], [f"{n}_y"], f"{n}_second"),
            ],
            n,
            [],
            [info(f"{n}_y")],
            [
                numpy_helper.from_array(w, f"{n}_w"),
                numpy_helper.from_array(np.flip(w), f"{n}_w2"),
            ],
        )
        for n, w in (("then", W), ("else", V))
    ]
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
    ]
    return model(nodes, zero=np.array(0, np.float32))


def branches_expected(name: str, xs: list[Array]) -> list[Array]:
    n, place = name.split("_")
    w = W if n == "then" else V
    if place == "first":  # what stands outside is the same whichever branch runs
        return xs
    return [np.tanh(x @ w) for x in xs if (x.sum() > 0) == (n == "then")]


def loop() -> onnx.ModelProto:
    """Three rounds of state = tanh(state · w), convolved in the end of each."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["h"], "loop_matmul"),
            helper.make_node("Tanh", ["h"], ["t"]),
            helper.make_node("Unsqueeze", ["t", "axis"], ["u"]),
            helper.make_node("Transpose", ["u"], ["p"], perm=[1, 2, 0]),
            helper.make_node("Conv", ["p", "k"], ["c"], "loop_conv", pads=[1, 1]),
            helper.make_node("Transpose", ["c"], ["q"], perm=[2, 0, 1]),
            helper.make_node("Squeeze", ["q", "axis"], ["next"]),
            helper.make_node("Identity", ["go"], ["again"]),
        ],
        "body",
        [info("i", TensorProto.INT64), info("go", TensorProto.BOOL), info("state")],
        [info("again", TensorProto.BOOL), info("next")],
    )
    nodes = [helper.make_node("Loop", ["times", "true", "x"], ["y"], "loop", body=body)]
    return model(
        nodes,
        times=np.array(3, np.int64),
        true=np.array(True),
        w=W,
        k=KERNEL,
        axis=np.array([0], np.int64),
    )


def loop_expected(name: str, xs: list[Array]) -> list[Array]:
    seen: dict[str, list[Array]] = {"loop_matmul": [], "loop_conv": []}
    for x in xs:
        state = x
        for _ in range(3):
            seen["loop_matmul"].append(state)
            inner = np.tanh(state @ W)
            # A sequence of one position with zeros on either side.
            patches = np.zeros((4, 6, 3))
            patches[:, :, 1] = inner
            seen["loop_conv"].append(patches.reshape(4, 18))
            state = inner @ KERNEL[:, :, 1].T
    return seen[name]


def scan() -> onnx.ModelProto:
    """Along the rows of x, with a layer on what is scanned and on the state."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["row", "w"], ["a"], "scan_row"),
            helper.make_node("MatMul", ["state", "v"], ["b"], "scan_state"),
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("Tanh", ["sum"], ["next"]),
            helper.make_node("Identity", ["next"], ["out"]),
        ],
        "body",
        [info("state"), info("row")],
        [info("next"), info("out")],
    )
    node = helper.make_node(
        "Scan",
        ["start", "x"],
        ["last", "y"],
        "scan",
        body=body,
        num_scan_inputs=1,
        scan_output_axes=[0],
    )
    return model([node], start=np.zeros(6, np.float32), w=W, v=V)


def scan_expected(name: str, xs: list[Array]) -> list[Array]:
    seen: dict[str, list[Array]] = {"scan_row": [], "scan_state": []}
    for x in xs:
        state = np.zeros(6)
        for row in x:
            seen["scan_row"].append(row[None])
            seen["scan_state"].append(state[None])
            state = np.tanh(row @ W + state @ V)
    return seen[name]


CASES: dict[
    str, tuple[Callable[[], onnx.ModelProto], Callable[[str, list[Array]], list[Array]]]
] = {
    "If": (branches, branches_expected),
    "Loop": (loop, loop_expected),
    "Scan": (scan, scan_expected),
}


def seen_in(
    make: Callable[[], onnx.ModelProto], count: int = 20
) -> tuple[dict[str, Statistics], list[Array]]:
    rng = np.random.default_rng(1)
    feeds: list[Feed] = [
        {"x": (rng.standard_normal((4, 6)) + 0.1).astype(np.float32)} for _ in range(count)
    ]
    prepared = prepare(load(make()), feed=feeds[0])
    return calibrated(prepared, prepared.layers, feeds), [f["x"].astype(float) for f in feeds]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_layers_in_bodies_are_given(
    case: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, in the iterations and branches that ran."""
    if wide:
        monkeypatch.setattr(statistics_module, "WIDEST", 1)
    make, expected = CASES[case]
    statistics, xs = seen_in(make)
    names = {
        "If": ["then_first", "then_second", "else_first", "else_second"],
        "Loop": ["loop_matmul", "loop_conv"],
        "Scan": ["scan_row", "scan_state"],
    }[case]
    assert sorted(statistics) == sorted(names)
    for name in names:
        rows = np.concatenate(expected(name, xs))
        item = statistics[name]
        assert item.rows == len(rows)
        np.testing.assert_allclose(item.mean[0], rows.mean(axis=0), rtol=1e-4, atol=1e-5)
        wanted = np.cov(rows.T, bias=True)
        if item.sample is None:
            np.testing.assert_allclose(item.covariance[0], wanted, rtol=1e-4, atol=1e-5)
            continue
        sample = item.sample[0].astype(float)
        np.testing.assert_allclose(sample.T @ sample / len(rows), wanted, rtol=1e-3, atol=1e-5)
        assert item.outputs is not None
        assert name.endswith("first") or item.outputs.rows == len(rows)


def test_values_of_another_size_in_each_iteration_are_left_out() -> None:
    """The layer in the Loop is fitted to its weight then; that behind it isn't."""

    def growing() -> onnx.ModelProto:
        made = loop()
        (node,) = made.graph.node
        body = node.attribute[0].g
        del body.node[2:]
        body.node.extend(
            [
                helper.make_node("Concat", ["t", "t"], ["next"], axis=0),
                helper.make_node("Identity", ["go"], ["again"]),
            ]
        )
        node.output[0] = "z"
        made.graph.node.append(helper.make_node("MatMul", ["z", "w2"], ["y"], "behind"))
        made.graph.initializer.append(numpy_helper.from_array(V, "w2"))
        return made

    statistics, _ = seen_in(growing)
    assert list(statistics) == ["behind"]


def test_names_that_several_bodies_have_are_not_lifted() -> None:
    made = branches()
    for attribute in made.graph.node[2].attribute:
        for item in attribute.g.node:
            for names in (item.input, item.output):
                names[:] = [name.replace("else_t", "then_t") for name in names]
    before = made.SerializeToString()
    assert lift(made.graph, "then_t", FLOAT) is None
    assert lift(made.graph, "nowhere", FLOAT) is None
    assert made.SerializeToString() == before
    assert lift(made.graph, "else_h", FLOAT) == "else_h/lifted_0"
