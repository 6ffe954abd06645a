"""Tables that are looked up and multiplied, and experts that are picked from a stack."""

from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.limits import Limits
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import choose_passes
from onnxlr.model.load import load
from onnxlr.prepare.prepared import prepare
from onnxlr.system.session import ONE_CPU_THREAD
from onnxlr.verify.layer_latency import measure
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


def test_both_uses_of_a_tied_table_are_timed() -> None:
    prepared = prepare(load(language_model("plain")), feed=FEED)
    (layer,) = prepared.layers
    choice = Choice(choose_passes(("embedding-svd",))[0], (5,))
    times = [
        measure(prepared.model, layer, use, choice, ONE_CPU_THREAD, Limits(layer_seconds=0.01))
        for use in layer.uses
    ]
    assert [use.node.op_type for use in layer.uses] == ["Gather", "MatMul"]
    assert None not in times


@pytest.mark.parametrize("picked", [(), (1,), (2, 1)])
def test_experts_have_factors_each(picked: tuple[int, ...]) -> None:
    stack = np.stack([low_rank(RNG, 48, 40, 3) for _ in range(4)])
    nodes = [
        node("Cast", ["i"], "index", to=onnx.TensorProto.INT64),
        node("Gather", ["experts", "index"], "e", "pick", axis=0),
        node("MatMul", ["x", "e"], "y", "apply"),
    ]
    model = make_model(nodes, {"x": (5, 48), "i": picked}, ["y"], {"experts": stack})
    result = onnxlr.optimize(model, **EXACT)
    assert [(d.decision, d.rank) for d in result.plan.decisions] == [("svd", (3,))]
    stored = [list(t.dims) for t in result.model.graph.initializer if "svd" in t.name]
    assert stored == [[4, 48, 3], [4, 3, 40]]
    feed = {
        "x": RNG.standard_normal((5, 48)).astype(np.float32),
        "i": RNG.integers(0, 4, picked).astype(np.float32).reshape(picked),
    }
    assert relative(run(model, feed)[0], run(result.model, feed)[0]) < 1e-5
