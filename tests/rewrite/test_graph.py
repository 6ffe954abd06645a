"""Graphs with chains in place of layers: nothing that a model carries is lost."""

import numpy as np
import onnx
import pytest

from tests.support.builders import linear, make_model, node, relative, replaced, run

RNG = np.random.default_rng(0)


def test_the_output_keeps_what_the_model_carries() -> None:
    model = linear(RNG.standard_normal((40, 30)).astype(np.float32), name="fc")
    model.metadata_props.add(key="character", value="abc\ndef")
    model.producer_name, model.domain, model.model_version = "trainer", "org.example", 7
    model.doc_string, model.graph.doc_string = "what it is", "a graph"
    model.graph.name = "classifier"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 3))
    written = replaced(model, "svd", (4,))
    assert {p.key: p.value for p in written.metadata_props}["character"] == "abc\ndef"
    for name in ("producer_name", "domain", "model_version", "doc_string", "ir_version"):
        assert getattr(written, name) == getattr(model, name)
    assert written.graph.name == "classifier"
    assert written.graph.doc_string == "a graph"
    assert list(written.graph.input) == list(model.graph.input)
    assert list(written.graph.output) == list(model.graph.output)
    assert {(o.domain, o.version) for o in written.opset_import} == {
        (o.domain, o.version) for o in model.opset_import
    }


def test_what_the_graph_library_has_no_room_for_is_carried() -> None:
    model = linear(RNG.standard_normal((40, 30)).astype(np.float32), name="fc")
    model.training_info.add().algorithm.name = "sgd"
    annotation = model.graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    written = replaced(model, "svd", (4,), check=False)
    assert list(written.graph.quantization_annotation) == [annotation]
    assert [t.algorithm.name for t in written.training_info] == ["sgd"]


def test_names_derive_from_the_original_s_and_stay_unique() -> None:
    weight = RNG.standard_normal((40, 30)).astype(np.float32)
    model = make_model(
        [node("MatMul", ["x", "w"], "fc/svd_0", "fc"), node("Relu", ["fc/svd_0"], "w/svd_0")],
        {"x": (4, 40)},
        ["w/svd_0"],
        {"w": weight},
    )
    written = replaced(model, "svd", (4,))
    assert [n.name for n in written.graph.node][:2] == ["fc/svd_0_1", "fc/svd_1"]
    assert written.graph.node[1].output[0] == "fc/svd_0"
    names = [t.name for t in written.graph.initializer] + [
        o for n in written.graph.node for o in n.output
    ]
    assert len(set(names)) == len(names)


def test_initializers_before_ir_4_stay_usable() -> None:
    weight = RNG.standard_normal((40, 30)).astype(np.float32)
    model = make_model(
        [node("MatMul", ["x", "w"], "y", "fc")],
        {"x": (4, 40)},
        ["y"],
        {"w": weight},
        opset=7,
        ir_version=3,
    )
    written = replaced(model, "svd", (30,))
    assert [i.name for i in written.graph.input] == ["x"]
    x = RNG.standard_normal((4, 40)).astype(np.float32)
    assert relative(run(model, {"x": x})[0], run(written, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize("reader", ["another node", "an output"])
def test_nothing_that_is_still_read_is_removed(reader: str) -> None:
    weight = RNG.standard_normal((8, 8)).astype(np.float32)
    model = make_model(
        [
            node("Identity", ["w"], "v"),
            node("MatMul", ["x", "w"], "a"),
            node("MatMul", ["a", "u"], "y"),
        ],
        {"x": (4, 8)},
        ["y"],
        {"w": weight, "u": weight},
    )
    if reader == "an output":
        model.graph.output.append(onnx.helper.make_tensor_value_info("v", 1, [8, 8]))
    else:
        model.graph.node.append(node("Relu", ["v"], "z"))
        model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, [8, 8]))
    written = replaced(model, "svd", (8,))
    assert "w" in {t.name for t in written.graph.initializer}
    assert "u" not in {t.name for t in written.graph.initializer}
    x = RNG.standard_normal((4, 8)).astype(np.float32)
    for before, after in zip(run(model, {"x": x}), run(written, {"x": x}), strict=True):
        assert relative(before, after) < 1e-5


def test_long_names_are_not_repeated_and_stay_apart() -> None:
    """TensorFlow's names have hundreds of characters, which would take more than is saved."""
    long = "model_1/re_lu_3/Relu;model_1/batch_normalization/" * 6
    weights = {f"{long}{c}": RNG.standard_normal((12, 12)).astype(np.float32) for c in "ab"}
    nodes = [
        node("MatMul", ["x", f"{long}a"], f"{long}h", f"{long}first"),
        node("MatMul", [f"{long}h", f"{long}b"], "y", f"{long}second"),
    ]
    model = make_model(nodes, {"x": (4, 12)}, ["y"], weights)
    written = replaced(model, "svd", (12,))
    x = RNG.standard_normal((4, 12)).astype(np.float32)
    assert relative(run(model, {"x": x})[0], run(written, {"x": x})[0]) < 1e-5
    names = [name for n in written.graph.node for name in (n.name, *n.output)]
    names += [i.name for i in written.graph.initializer]
    kept = {f"{long}h", "y"}
    assert all(len(name) < 80 for name in names if name not in kept)
    assert len({n.name for n in written.graph.node}) == 4
