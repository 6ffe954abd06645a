"""What is found at the end of a graph, as exporters write it: in one node, or in small parts."""

from typing import Any

import numpy as np
import onnx
import pytest

from onnxlr.model.load import load
from onnxlr.prepare.prepared import simplified_model
from onnxlr.verify.endings import Ending, endings
from tests.support.builders import make_model, node

WEIGHTS = {
    "w": np.ones((6, 4), np.float32),
    "wide": np.ones((6, 8), np.float32),
    "tied": np.ones((8, 6), np.float32),
    "bias": np.ones(6, np.float32),
    "half": np.array(0.5, np.float32),
    "two": np.array(2, np.float32),
    "last": np.array([-1]),
    "first": np.array([1]),
    "shape": np.array([0, -1]),
}
MEAN = node("ReduceMean", ["x"], "mean", axes=[-1])
CENTRED = node("Sub", ["x", "mean"], "d")
SQUARED = node("Pow", ["d", "two"], "s")
VARIANCE = node("ReduceMean", ["s"], "v", axes=[-1])
ADDED = node("Add", ["v", "half"], "a")
SUM = node("ReduceSum", ["e", "last"], "t")
CASES: dict[str, tuple[list[Any], Ending]] = {
    "softmax": ([node("Softmax", ["x"], "y")], Ending("softmax")),
    "softmax in parts": (
        [node("Exp", ["x"], "e"), SUM, node("Div", ["e", "t"], "y")],
        Ending("softmax"),
    ),
    "linear, narrow": ([node("MatMul", ["x", "w"], "y")], Ending("linear")),
    "linear, wide": ([node("MatMul", ["x", "wide"], "y")], Ending("linear", widens=True)),
    "Gemm, transposed": (
        [
            node("Reshape", ["x", "shape"], "f"),
            node("Gemm", ["f", "tied"], "y", transB=1),
        ],
        Ending("linear", widens=True),
    ),
    "tied weights, a bias and a cast": (
        [
            node("Transpose", ["tied"], "turned", perm=[1, 0]),
            node("MatMul", ["x", "turned"], "z"),
            node("Add", ["half", "z"], "b"),
            node("Cast", ["b"], "y", to=1),
        ],
        Ending("linear", widens=True),
    ),
    "a product of activations": (
        [node("Transpose", ["x"], "t", perm=[0, 2, 1]), node("MatMul", ["x", "t"], "y")],
        Ending("other"),
    ),
    "sigmoid": (
        [node("MatMul", ["x", "w"], "z"), node("Sigmoid", ["z"], "y")],
        Ending("sigmoid"),
    ),
    "tanh": ([node("MatMul", ["x", "w"], "z"), node("Tanh", ["z"], "y")], Ending("activation")),
    "L2": ([node("LpNormalization", ["x"], "y", axis=-1, p=2)], Ending("L2 norm")),
    "L2 by its norm": (
        [
            node("ReduceL2", ["x"], "n", axes=[-1]),
            node("Clip", ["n", "half"], "c"),
            node("Expand", ["c", "sizes"], "wide_c"),
            node("Div", ["x", "wide_c"], "y"),
        ],
        Ending("L2 norm"),
    ),
    "L2 by a root": (
        [
            node("Mul", ["x", "x"], "e"),
            SUM,
            node("Sqrt", ["t"], "n"),
            node("Reciprocal", ["n"], "r"),
            node("Mul", ["x", "r"], "y"),
        ],
        Ending("L2 norm"),
    ),
    "layer norm": ([node("LayerNormalization", ["x", "bias"], "y")], Ending("layer norm")),
    "layer norm in parts": (
        [
            *(MEAN, CENTRED, SQUARED, VARIANCE, ADDED),
            node("Sqrt", ["a"], "n"),
            node("Div", ["d", "n"], "z"),
            node("Mul", ["z", "bias"], "g"),
            node("Add", ["g", "bias"], "y"),
        ],
        Ending("layer norm"),
    ),
    "mean": ([node("ReduceMean", ["x"], "y", axes=[1])], Ending("pooling")),
    "mean over a mask": (
        [
            node("Clip", ["x", "half"], "mask"),
            node("Mul", ["x", "mask"], "h"),
            node("ReduceSum", ["h", "first"], "s"),
            node("ReduceSum", ["mask", "first"], "n"),
            node("Div", ["s", "n"], "y"),
        ],
        Ending("pooling"),
    ),
    "a mean without a root": ([MEAN, node("Div", ["x", "mean"], "y")], Ending("other")),
    "residual sum": (
        [node("MatMul", ["x", "square"], "z"), node("Add", ["x", "z"], "y")],
        Ending("residual sum"),
    ),
    "convolution": (
        [node("Conv", ["x", "k"], "z"), node("Relu", ["z"], "y")],
        Ending("convolution"),
    ),
    "nothing": ([node("Identity", ["x"], "y")], Ending("other")),
}


@pytest.mark.parametrize(("nodes", "expected"), CASES.values(), ids=CASES)
def test_endings(nodes: list[onnx.NodeProto], expected: Ending) -> None:
    weights = {
        **WEIGHTS,
        "square": np.ones((6, 6), np.float32),
        "k": np.ones((3, 5, 2), np.float32),
        "sizes": np.array([2, 5, 6]),
    }
    model = make_model(nodes, {"x": [2, 5, 6]}, ["y"], weights)
    assert endings(simplified_model(load(model))[0]) == {"y": expected}
