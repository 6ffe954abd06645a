"""What a rewrite must not lose: metadata and doc strings, once each, through any number of runs."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import onnxlr
from onnxlr.methods.registry import installed_passes
from tests.support.builders import low_rank, make_model, node

RNG = np.random.default_rng(0)
EXACT: dict[str, Any] = {"max_drop": 1.0, "measure": False}


def described(ir_version: int) -> onnx.ModelProto:
    """A convolution with a BatchNormalization, and two layers; everything has something to say."""
    kernel = low_rank(RNG, 64, 64 * 9, 4).reshape(64, 64, 3, 3)
    norm = {f"bn{i}": RNG.random(64).astype(np.float32) + 0.5 for i in range(4)}
    model = make_model(
        [
            node("Conv", ["x", "k"], "c", "conv", pads=[1] * 4),
            node("BatchNormalization", ["c", *norm], "n", "norm"),
            node("GlobalAveragePool", ["n"], "p", "pool"),
            node("Flatten", ["p"], "f", "flat"),
            node("MatMul", ["f", "w"], "h", "fc1"),
            node("MatMul", ["h", "v"], "y", "fc2"),
        ],
        {"x": (1, 64, 8, 8)},
        ["y"],
        {"k": kernel, **norm, "w": low_rank(RNG, 64, 96, 4), "v": low_rank(RNG, 96, 96, 4)},
        ir_version=ir_version,
    )
    values = [helper.make_tensor_value_info(n, 1, None) for n in ("n", "h")]
    model.graph.value_info.extend(values)
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.value_info):
        item.doc_string = f"doc of {item.name}"
        for i in range(2):
            item.metadata_props.add(key=f"key {i}", value=f"{item.name} {i}")
    return model


def said(item: Any) -> tuple[str, list[tuple[str, str]]]:
    ours = "onnxlr_"
    props = [(p.key, p.value) for p in item.metadata_props if not p.key.startswith(ours)]
    return item.doc_string, sorted(props)


@pytest.mark.parametrize("ir_version", [8, 10])
def test_what_was_said_is_said_once_on_what_replaces_it(ir_version: int) -> None:
    model = described(ir_version)
    once = onnxlr.optimize(model, rank="exact", **EXACT).model
    twice = onnxlr.optimize(once, rank="3", **EXACT).model
    before = {item.name: said(item) for item in (*model.graph.node, *model.graph.initializer)}
    for result, count in ((once, 6), (twice, 8)):
        chains = [n for n in result.graph.node if n.name.split("/")[0] in ("conv", "fc1", "fc2")]
        assert len(chains) >= count
        for item in (*chains, *result.graph.initializer):
            stem = item.name.split("/")[0]
            if not item.name.startswith("k/batch_norm_folded"):
                assert said(item) == before[stem]
        assert {v.name: said(v) for v in result.graph.value_info} == {
            v.name: said(v) for v in model.graph.value_info
        }
        for written in chains:
            made = {p.key: p.value for p in written.metadata_props if p.key.startswith("onnxlr_")}
            if ir_version < 10:
                assert made == {}
                continue
            assert made["onnxlr_replaces"] == written.name.split("/")[0]
            assert made["onnxlr_method"] in installed_passes()
            assert made["onnxlr_rank"] in ("3", "3,3", "4", "4,4")
        onnx.checker.check_model(result)


def test_a_kept_layer_says_what_it_said() -> None:
    model = described(10)
    kept = onnxlr.optimize(model, rank="exact", include="fc1", **EXACT).model
    (weight,) = (t for t in kept.graph.initializer if t.name == "v")
    (v,) = (t for t in model.graph.initializer if t.name == "v")
    assert weight.SerializeToString(deterministic=True) == v.SerializeToString(deterministic=True)
    (fc2,) = (n for n in kept.graph.node if n.name == "fc2")
    assert said(fc2) == said(model.graph.node[-1])
    assert not any(p.key.startswith("onnxlr_") for p in fc2.metadata_props)
