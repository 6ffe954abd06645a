"""Tables that are looked up and multiplied: one factorization, stored once, for both."""

from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from tests.support.builders import low_rank, make_model, node, relative, run
from tests.support.pass_cases import tied_in_branches

RNG = np.random.default_rng(0)
EXACT: dict[str, Any] = {"rank": "exact", "max_drop": 1.0, "measure": False}
FEED = {"x": RNG.integers(0, 200, (2, 3)).astype(np.float32)}


def language_model(kind: str) -> onnx.ModelProto:
    table = low_rank(RNG, 200, 64, 5)
    nodes = [
        node("Cast", ["x"], "i", to=onnx.TensorProto.INT64),
        node("Gather", ["w", "i"], "e", "embedding"),
    ]
    if kind == "half":
        table = table.astype(np.float16)
        nodes[1:] = [
            node("Cast", ["w"], "wide", to=1),
            node("Gather", ["wide", "i"], "e", "embedding"),
            node("Transpose", ["wide"], "t"),
        ]
    elif kind == "head first":  # in the order of the graph
        nodes[:0] = [
            node("MatMul", ["x", "p"], "start", "before"),
            node("Transpose", ["w"], "t"),
            node("MatMul", ["start", "t"], "first", "first head"),
        ]
        nodes.append(node("Gather", ["w", "i"], "again", "second"))
    else:
        nodes.append(node("Transpose", ["w"], "t"))
    nodes.append(node("MatMul", ["e", "t"], "y", "head"))
    inputs: dict[str, Any] = {"x": (2, 3)}
    weights = {"w": table, "p": RNG.standard_normal((3, 64)).astype(np.float32)}
    outputs = ["y", "first", "again"] if kind == "head first" else ["y"]
    return make_model(nodes, inputs, outputs, weights)


@pytest.mark.parametrize("kind", ["plain", "half", "head first"])
def test_one_factorization_serves_both(kind: str) -> None:
    model = language_model(kind)
    result = onnxlr.optimize(model, **EXACT)
    (row,) = (d for d in result.plan.decisions if d.name != "before")
    assert (row.name, row.weight) == ("embedding", "w")
    assert (row.decision, row.rank) == ("embedding-svd", (5,))
    stored = {t.name: list(t.dims) for t in result.model.graph.initializer}
    assert [s for n, s in stored.items() if "embedding_svd" in n] == [[200, 5], [5, 64]]
    assert "w" not in stored
    limit = 3e-3 if kind == "half" else 1e-5
    for before, after in zip(run(model, FEED), run(result.model, FEED), strict=True):
        assert relative(before, after) < limit


def test_across_branches() -> None:
    model = tied_in_branches((200, 64))
    table = low_rank(RNG, 200, 64, 4)
    (weight,) = (t for t in model.graph.initializer if t.name == "w")
    weight.CopyFrom(onnx.numpy_helper.from_array(table, "w"))
    result = onnxlr.optimize(model, verify="layers", rank="exact", method="embedding-svd")
    assert [d.decision for d in result.plan.decisions] == ["embedding-svd"]
    feed = {"x": RNG.integers(0, 200, (2, 3)).astype(np.float32)}
    assert relative(run(model, feed)[0], run(result.model, feed)[0]) < 1e-5


def test_auto_weighs_both_uses() -> None:
    """What it is multiplied by costs, what is looked up does not."""
    model = language_model("plain")
    result = onnxlr.optimize(model, target="macs=0.5", measure=False)
    (row,) = result.plan.decisions
    assert row.decision == "embedding-svd"
    assert row.macs_before == 2 * 3 * 200 * 64
    assert (row.macs_after or 0) < row.macs_before / 2
