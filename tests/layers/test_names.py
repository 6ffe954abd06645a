"""Layers are called what their owner calls them, and plans of before find them."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import onnxlr
from onnxlr.plan.plan import Plan
from tests.support.builders import make_model, node


def rand(*shape: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape).astype(np.float32)


def two_layers(node_name: str, weight: str, op: str = "Gemm") -> onnx.ModelProto:
    nodes = [
        node(op, ["x", weight], "h", node_name),
        node("Relu", ["h"], "r", "act"),
        node("MatMul", ["r", "last.weight"], "y", "last"),
    ]
    weights = {weight: rand(24, 20), "last.weight": rand(20, 16)}
    return make_model(nodes, {"x": (3, 24)}, ["y"], weights)


def first_name(model: onnx.ModelProto) -> str:
    return onnxlr.inspect(model)[0].layer.name


@pytest.mark.parametrize(
    ("node_name", "weight", "shown"),
    [
        ("node_Gemm_211", "r3.a.0.weight", "r3.a.0.weight"),
        ("node_linear", "r3.a.0.weight", "r3.a.0.weight"),
        ("node_linear_5", "encoder/dense/kernel:0", "encoder/dense/kernel:0"),
        ("Gemm_12", "fc1_weight", "fc1_weight"),
        ("n12", "block.weight", "block.weight"),
        ("7", "block.weight", "block.weight"),
        ("", "block.weight", "block.weight"),
        # Names that say something stay, whatever the weight is called.
        ("fc1", "r3.a.0.weight", "fc1"),
        ("Gemm", "r3.a.0.weight", "Gemm"),
        ("/encoder/layer.0/dense/MatMul", "r3.a.0.weight", "/encoder/layer.0/dense/MatMul"),
        ("node_query_3", "r3.a.0.weight", "node_query_3"),
        # So do those whose weight says no more.
        ("node_Gemm_211", "onnx::MatMul_77", "node_Gemm_211"),
        ("node_Gemm_211", "val_62", "node_Gemm_211"),
        ("node_Gemm_211", "w", "node_Gemm_211"),
    ],
)
def test_the_name_that_says_more_is_shown(node_name: str, weight: str, shown: str) -> None:
    assert first_name(two_layers(node_name, weight)) == shown


def test_a_name_is_given_once() -> None:
    """A weight that is called as another layer's node doesn't take its name."""
    nodes = [
        node("MatMul", ["x", "a.weight"], "h", "node_MatMul_1"),
        node("MatMul", ["h", "b"], "y", "a.weight"),
    ]
    model = make_model(nodes, {"x": (3, 8)}, ["y"], {"a.weight": rand(8, 8), "b": rand(8, 8)})
    assert [item.layer.name for item in onnxlr.inspect(model)] == ["node_MatMul_1", "a.weight"]


@pytest.mark.parametrize(
    ("scopes", "shown"),
    [
        ("['', 'enc', 'enc.layers.0', 'enc.layers.0.linear1', 'linear_3']", "enc.layers.0.linear1"),
        ("['', 'linear']", "node_MatMul_91"),
        ("", "node_MatMul_91"),
    ],
)
def test_a_weight_without_a_name_is_called_by_its_module(scopes: str, shown: str) -> None:
    """The exporter transposes weights, and numbers what comes of it."""
    model = two_layers("node_MatMul_91", "val_12", "MatMul")
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert first_name(model) == shown


def test_layers_of_one_module_are_numbered() -> None:
    nodes = [
        node("MatMul", ["x", "val_1"], "h", "node_MatMul_1"),
        node("MatMul", ["h", "val_2"], "y", "node_MatMul_2"),
    ]
    for item in nodes:
        item.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'a.b', 'linear']")
    model = make_model(nodes, {"x": (3, 8)}, ["y"], {"val_1": rand(8, 8), "val_2": rand(8, 8)})
    assert [item.layer.name for item in onnxlr.inspect(model)] == ["a.b", "a.b_1"]


def test_filters_match_what_is_shown() -> None:
    model = two_layers("node_Gemm_2", "r3.a.weight")
    result = onnxlr.optimize(model, rank=4, verify="none", include=r"^r3\.a\.weight$")
    assert [d.name for d in result.plan.replaced] == ["r3.a.weight"]


def test_plans_with_names_of_nodes_are_carried_out() -> None:
    """What an earlier version wrote makes the same bytes."""
    model = two_layers("node_Gemm_2", "r3.a.weight")
    result = onnxlr.optimize(model, rank=4, verify="none")
    names = {"r3.a.weight": "node_Gemm_2", "last": "last"}
    before = replace(
        result.plan,
        decisions=tuple(replace(d, name=names[d.name]) for d in result.plan.decisions),
    )
    assert [d.name for d in before.replaced] == ["node_Gemm_2", "last"]
    again = onnxlr.apply(Plan.from_json(before.to_json()), model)
    assert again.SerializeToString() == result.model.SerializeToString()
    assert again != model
