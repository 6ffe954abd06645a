"""Every parameter of a file is accounted for, and what can't be run or read says what works."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import helper

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.errors import ModelError
from onnxlr.layers.find import fed_weights
from onnxlr.model.load import load
from tests.support.builders import Array, linear, low_rank, make_model, node, relative, run

RNG = np.random.default_rng(0)
W = low_rank(RNG, 32, 32, 2)
EXACT: dict[str, Any] = {"rank": "exact", "max_drop": 1.0, "measure": False}


def with_domain(model: onnx.ModelProto, domain: str) -> onnx.ModelProto:
    model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def plugin(domain: str, weight: Array | None = None) -> onnx.ModelProto:
    """Two layers around an operator that nobody here knows."""
    inputs = ["h"] if weight is None else ["h", "big"]
    nodes = [
        node("MatMul", ["x", "w"], "h", "first"),
        helper.make_node("Mystery_TRT", inputs, ["k"], name="mystery", domain=domain, level=3),
        node("MatMul", ["k", "v"], "y", "second"),
    ]
    stored = {"w": W, "v": W.T.copy()} | ({} if weight is None else {"big": weight})
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [4, 32])],
        [helper.make_tensor_value_info("y", 1, [4, 32])],
        [onnx.numpy_helper.from_array(a, n) for n, a in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return with_domain(model, domain) if domain else model


def reasons(model: onnx.ModelProto) -> dict[str, str]:
    return {r.layer.name: r.layer.refusal or "" for r in onnxlr.inspect(model)}


@pytest.mark.parametrize("views", [[], ["Identity"], ["Transpose", "Cast"]])
def test_large_matrices_of_unknown_operators_are_listed(views: list[str]) -> None:
    model = plugin("my.plugin", RNG.standard_normal((48, 32)).astype(np.float32))
    for i, op in enumerate(views):
        attributes: dict[str, Any] = {"to": 1} if op == "Cast" else {}
        consumer = model.graph.node[1 + i]
        model.graph.node.insert(i, node(op, [consumer.input[1]], f"v{i}", **attributes))
        consumer.input[1] = f"v{i}"
    assert reasons(model)["mystery"] == "no method replaces the weights of my.plugin.Mystery_TRT"
    assert list(reasons(model)) == ["first", "mystery", "second"]


@pytest.mark.parametrize(
    "weight",
    [
        RNG.standard_normal((1, 2000)).astype(np.float32),  # a vector
        RNG.standard_normal((20, 40)).astype(np.float32),  # small
        np.ones((48, 32), np.int64),
    ],
)
def test_vectors_small_arrays_and_integers_are_not_listed(weight: Array) -> None:
    assert list(reasons(plugin("my.plugin", weight))) == ["first", "second"]


def test_a_table_beside_the_weight_of_a_node_has_its_own_name() -> None:
    model = make_model(
        [node("Gemm", ["x", "w", "c"], "g", "fc"), node("Add", ["g", "table"], "y", "places")],
        {"x": (40, 32)},
        ["y"],
        {"w": W, "c": np.tile(W, (2, 1))[:40], "table": np.tile(W, (2, 1))[:40] + 1},
    )
    assert list(reasons(model)) == ["fc", "c", "places"]


def test_several_weights_of_an_unknown_operator_have_their_names() -> None:
    model = plugin("my.plugin", np.tile(W, (2, 1)))
    model.graph.node[1].input.append("third")
    model.graph.initializer.append(onnx.numpy_helper.from_array(W + 2, "third"))
    assert set(reasons(model)) == {"first", "big", "second", "third"}


def test_inspect_counts_the_whole_file(tmp_path: Path) -> None:
    onnx.save(plugin("my.plugin", np.tile(W, (2, 1))), tmp_path / "in.onnx")
    command = ["inspect", str(tmp_path / "in.onnx"), "--json", str(tmp_path / "i.json")]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert "3 layers, used by 3 nodes, 4,096 of the file's 4,096 parameters" in done.output
    content = json.loads((tmp_path / "i.json").read_text())
    assert content["params"] == sum(row["params"] for row in content["layers"]) == 4096


def test_they_are_expanded_at_load_but_for_masks() -> None:
    table = low_rank(RNG, 64, 32, 2)
    nodes = [node("MatMul", ["x", "w"], "h", "fc"), node("Add", ["h", "table"], "y", "places")]
    model = make_model(nodes, {"x": (64, 32)}, ["y"], {"w": W, "table": table})
    result = onnxlr.optimize(model, expand_at_load=True, **EXACT)
    assert {d.name: d.decision for d in result.plan.decisions}["places"] == "expand-at-load"
    feed = {"x": RNG.standard_normal((64, 32)).astype(np.float32)}
    assert relative(run(model, feed)[0], run(result.model, feed)[0]) < 1e-5
    masked = make_model(
        nodes, {"x": (64, 32)}, ["y"], {"w": W, "table": np.where(table > 0, -np.inf, table)}
    )
    result = onnxlr.optimize(masked, expand_at_load=True, **EXACT)
    assert {d.name: d.decision for d in result.plan.decisions}["places"] == "keep"


def test_models_that_the_runtime_saved(tmp_path: Path) -> None:
    kernel = low_rank(RNG, 32, 288, 3).reshape(32, 32, 3, 3)
    nodes = [node("Conv", ["x", "k"], "c", "conv", pads=[1] * 4), node("Relu", ["c"], "y")]
    model = make_model(nodes, {"x": (1, 32, 8, 8)}, ["y"], {"k": kernel})
    for name in ("all.onnx", "model.ort"):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / name)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    with pytest.raises(ModelError, match=r"own format \(.ort\), which nothing else reads"):
        onnxlr.inspect(tmp_path / "model.ort")
    (row,) = onnxlr.inspect(tmp_path / "all.onnx")
    if row.layer.uses[0].node.domain == "com.microsoft.nchwc":  # by the processor
        assert "has reordered the weight" in (row.layer.refusal or "")


@pytest.mark.parametrize("domain", ["", "my.plugin"])
@pytest.mark.parametrize("external", [False, True])
def test_plugins_are_told_what_works_and_that_works(
    domain: str, external: bool, tmp_path: Path
) -> None:
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(plugin(domain), path, save_as_external_data=external, size_threshold=64)
    with pytest.raises(ModelError, match="; --verify layers doesn't run it"):
        onnxlr.optimize(path, out)
    np.savez(tmp_path / "x.npz", x=np.ones((8, 32), np.float32))
    with pytest.raises(ModelError, match="; leave out --data"):
        onnxlr.optimize(path, out, verify="layers", data=tmp_path / "x.npz")
    result = onnxlr.optimize(path, out, verify="layers", **EXACT)
    assert [d.decision for d in result.plan.decisions] == ["svd", "svd"]
    assert "Mystery_TRT" in [n.op_type for n in onnx.load(out).graph.node]
    if domain == "":  # nothing but the checker looks at it then
        with pytest.raises(ModelError, match="Mystery_TRT"):
            onnxlr.optimize(path, out, verify="none")
    broken = plugin(domain)
    broken.graph.node[2].attribute.append(helper.make_attribute("no_such", 1))
    with pytest.raises(ModelError, match="no_such"):
        onnxlr.optimize(broken, verify="layers")


def test_weights_that_are_fed_are_named() -> None:
    model = make_model(
        [
            node("Transpose", ["w"], "t"),
            node("MatMul", ["x", "t"], "h", "fc"),
            node("MatMul", ["h", "h2"], "y", "scores"),
        ],
        {"x": ("n", 32), "w": (32, 32), "h2": (32, "m")},
        ["y"],
        {},
    )
    assert fed_weights(load(model).model) == ["w"]
    result = onnxlr.optimize(model, measure=False)
    assert result.plan.decisions == ()
    assert any(
        note.startswith("1 inputs are used as weights, but have no value in the file: w;")
        for note in result.report.notes
    )
    assert fed_weights(load(linear(W)).model) == []


def test_quantized_weights_are_told_in_which_order_to_have_both(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    stored = rng.integers(-127, 128, (32, 32)).astype(np.int8)
    whole = rng.standard_normal((32, 24)).astype(np.float32)
    nodes = [
        node("DequantizeLinear", ["q", "scale"], "w"),
        node("MatMul", ["x", "w"], "h", "first"),
        node("MatMul", ["h", "v"], "y", "second"),
    ]
    weights: dict[str, Array] = {"q": stored, "scale": np.array(0.01, np.float32), "v": whole}
    model = make_model(nodes, {"x": ("n", 32)}, ["y"], weights)
    words = "1 weight is quantized already and left alone: start from the model before that"
    result = onnxlr.optimize(model, measure=False)
    assert any(note.startswith(words) for note in result.report.notes)
    onnx.save(model, tmp_path / "net.onnx")
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "net.onnx")]).output
    assert words in " ".join(shown.split())
    result = onnxlr.optimize(linear(W), measure=False)
    assert not any("quantized" in note for note in result.report.notes)
