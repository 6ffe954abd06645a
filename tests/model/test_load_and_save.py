"""Loading, preparing and writing: nothing a model carries is lost."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxlr
from onnxlr.errors import ModelError, OutputError
from onnxlr.model.constants import count_params
from onnxlr.model.graph import Names
from onnxlr.model.load import load
from onnxlr.model.place import move_into_place
from onnxlr.model.protobuf import all_tensors, to_proto
from onnxlr.model.save import save
from onnxlr.prepare.batch_norm import fold_batch_norms
from onnxlr.system.files import workspace
from tests.support.builders import linear, low_rank, make_model, node, relative, replaced, run

RNG = np.random.default_rng(0)


def bn_model(
    *, outputs: int, inputs: int, group: int, bias: bool, opset: int, epsilon: float, seed: int
) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    weights = {
        "k": rng.standard_normal((outputs, inputs // group, 3, 3)),
        "scale": rng.uniform(0.2, 3, outputs),
        "shift": rng.standard_normal(outputs),
        "mean": rng.standard_normal(outputs),
        "var": rng.uniform(0.01, 4, outputs),
    } | ({"b": rng.standard_normal(outputs)} if bias else {})
    return make_model(
        [
            node(
                "Conv",
                ["x", "k", "b"] if bias else ["x", "k"],
                "c",
                "conv",
                group=group,
                pads=[1, 0, 1, 2],
                strides=[2, 1],
            ),
            node(
                "BatchNormalization", ["c", "scale", "shift", "mean", "var"], "n", epsilon=epsilon
            ),
            node("Relu", ["n"], "y"),
        ],
        {"x": (2, inputs, 7, 8)},
        ["y"],
        {n: w.astype(np.float32) for n, w in weights.items()},
        opset=opset,
    )


@settings(max_examples=40, deadline=None)
@given(
    group=st.integers(1, 2),
    per=st.integers(1, 3),
    bias=st.booleans(),
    opset=st.sampled_from([7, 9, 13, 17, 21]),
    epsilon=st.sampled_from([1e-5, 1e-3, 0.1]),
    seed=st.integers(0, 99),
)
def test_batch_norm_folds_without_a_trace(
    group: int, per: int, bias: bool, opset: int, epsilon: float, seed: int
) -> None:
    model = bn_model(
        outputs=group * per,
        inputs=group * 2,
        group=group,
        bias=bias,
        opset=opset,
        epsilon=epsilon,
        seed=seed,
    )
    graph = load(model).model
    assert fold_batch_norms(graph).count == 1
    folded = to_proto(graph)
    onnx.checker.check_model(folded, full_check=True)
    assert [n.op_type for n in folded.graph.node] == ["Conv", "Relu"]
    assert len(folded.graph.initializer) == 2
    x = np.random.default_rng(1).standard_normal((2, group * 2, 7, 8)).astype(np.float32)
    assert relative(run(model, {"x": x})[0], run(folded, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize("reader", ["Relu", "output"])
def test_batch_norm_stays_where_the_conv_is_read_elsewhere(reader: str) -> None:
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=17, epsilon=1e-5, seed=0)
    if reader == "output":
        model.graph.output.append(onnx.helper.make_tensor_value_info("c", 1, [2, 4, 4, 8]))
    else:
        model.graph.node.append(node("Relu", ["c"], "other"))
    graph = load(model).model
    assert fold_batch_norms(graph).count == 0


def test_parameters_that_a_caller_may_feed_are_not_folded() -> None:
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=17, epsilon=1e-5, seed=0)
    model.graph.input.append(onnx.helper.make_tensor_value_info("scale", 1, [4]))
    assert fold_batch_norms(load(model).model).count == 0


@pytest.mark.parametrize("opset", [7, 9, 13])
def test_batch_norm_in_training_is_not_folded(opset: int) -> None:
    """Before opset 14 its further outputs say that it goes by the batch, read or not."""
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=opset, epsilon=1e-5, seed=0)
    (norm,) = (n for n in model.graph.node if n.op_type == "BatchNormalization")
    norm.output.extend(["dead_1", "dead_2", "dead_3", "dead_4"])
    assert fold_batch_norms(load(model).model).count == 0


def test_what_overflows_its_type_is_not_folded() -> None:
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=17, epsilon=1e-5, seed=0)
    (scale,) = (t for t in model.graph.initializer if t.name == "scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.full(4, 1e38, np.float32), "scale"))
    (var,) = (t for t in model.graph.initializer if t.name == "var")
    var.CopyFrom(onnx.numpy_helper.from_array(np.full(4, 1e-9, np.float32), "var"))
    assert fold_batch_norms(load(model).model).count == 0


def test_shared_kernels_are_not_folded() -> None:
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=17, epsilon=1e-5, seed=0)
    model.graph.node.append(node("Conv", ["x", "k"], "other"))
    graph = load(model).model
    assert fold_batch_norms(graph).count == 0


@pytest.mark.parametrize("kind", ["path", "bytes", "proto"])
def test_every_way_in(tmp_path: Path, kind: str) -> None:
    model = linear(RNG.standard_normal((7, 5)).astype(np.float32))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    ways: dict[str, Path | bytes | onnx.ModelProto] = {
        "path": path,
        "bytes": path.read_bytes(),
        "proto": model,
    }
    source = load(ways[kind])
    assert source.nbytes == path.stat().st_size
    assert source.digest == load(path).digest
    assert count_params(source.model) == 35


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


def test_sparse_initializers_are_refused_by_name() -> None:
    model = linear(np.ones((3, 3), np.float32))
    values = onnx.numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "sparse")
    indices = onnx.numpy_helper.from_array(np.array([0, 4], np.int64), "sparse_i")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3, 3]))
    with pytest.raises(ModelError, match="stores 'sparse' as a sparse initializer"):
        load(model)


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


def external(folder: Path) -> Path:
    path = folder / "big.onnx"
    model = linear(RNG.standard_normal((64, 64)).astype(np.float32))
    onnx.save(model, path, save_as_external_data=True, location="big.data", size_threshold=0)
    return path


def test_external_data_is_read_and_counted(tmp_path: Path) -> None:
    path = external(tmp_path)
    source = load(path)
    assert source.external == ("big.data",)
    assert source.nbytes == path.stat().st_size + (tmp_path / "big.data").stat().st_size
    assert count_params(source.model) == 64 * 64
    np.testing.assert_array_equal(
        source.model.graph.initializers["w"].const_value.numpy(),  # type: ignore[union-attr]
        onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0]),
    )


def everywhere(folder: Path, seed: int) -> onnx.ModelProto:
    """Weights in external data: of nodes, bodies and a function, and of a body in that."""
    rng = np.random.default_rng(seed)

    def weight(name: str) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(low_rank(rng, 32, 32, 3), name)

    def product(x: str, y: str) -> list[onnx.NodeProto]:
        tensor = onnx.helper.make_node("Constant", [], [f"k{y}"], value=weight(f"t{y}"))
        return [tensor, node("MatMul", [x, f"k{y}"], y)]

    def branch(x: str, y: str) -> onnx.GraphProto:
        out = onnx.helper.make_tensor_value_info(y, 1, ["n", 32])
        nodes = [node("MatMul", [x, f"w{y}"], y)]
        return onnx.helper.make_graph(nodes, y, [], [out], [weight(f"w{y}")])

    def either(x: str, y: str) -> onnx.NodeProto:
        bodies = {"then_branch": branch(x, f"t{y}"), "else_branch": branch(x, f"e{y}")}
        return onnx.helper.make_node("If", ["c"], [y], **bodies)

    yes = onnx.helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [1])
    true = onnx.helper.make_node("Constant", [], ["c"], value=yes)
    function = onnx.helper.make_function(
        "local",
        "F",
        ["a"],
        ["b"],
        [true, *product("a", "m"), either("m", "b")],
        [onnx.helper.make_opsetid("", 17)],
    )
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            *product("x", "h"),
            node("Identity", ["yes"], "c"),
            either("h", "i"),
            onnx.helper.make_node("F", ["i"], ["y"], domain="local"),
        ],
        "net",
        [info("x", 1, ["n", 32])],
        [info("y", 1, ["n", 32])],
        [onnx.numpy_helper.from_array(np.array(True), "yes")],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("local", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=[function])
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    tensors = [t for t in all_tensors(model) if len(t.dims) == 2]
    assert len(tensors) == 6
    blob = bytearray()
    for tensor in tensors:
        onnx.external_data_helper.set_external_data(tensor, "w.bin", len(blob), 32 * 32 * 4)
        blob += tensor.raw_data
        tensor.ClearField("raw_data")
    (folder / "w.bin").write_bytes(blob)
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    return whole


@pytest.mark.parametrize("rank", ["3", "1.0"])  # replaced, or left as it is and copied
def test_external_data_of_all_kinds_lie_beside_the_model(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another model, of the same name, are in the folder we are in."""
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "out"):
        Path(folder).mkdir()
    whole = everywhere(tmp_path / "in", 0)
    everywhere(tmp_path, 1)
    onnxlr.optimize("in/in.onnx", "out/o.onnx", rank=rank, target="params", verify="none")
    x = RNG.standard_normal((4, 32)).astype(np.float32)
    (before,) = run(whole, {"x": x})
    session = onnxruntime.InferenceSession("out/o.onnx", providers=["CPUExecutionProvider"])
    assert relative(before, session.run(None, {"x": x})[0]) < 1e-4
    onnx.checker.check_model("out/o.onnx")


def test_past_the_limit_weights_go_beside_the_model(tmp_path: Path) -> None:
    model = linear(RNG.standard_normal((64, 64)).astype(np.float32))
    out = tmp_path / "out.onnx"
    with workspace(out) as folder:
        size = save(load(model).model, folder / out.name, inside_limit=0)
        assert size == sum(p.stat().st_size for p in folder.iterdir())
        move_into_place(folder / out.name, out)
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written[0] == "out.onnx"
    assert re.fullmatch(r"weights-[0-9a-f]{16}\.data", written[1])
    assert len(written) == 2
    x = RNG.standard_normal((4, 64)).astype(np.float32)
    np.testing.assert_array_equal(run(onnx.load(out), {"x": x})[0], run(model, {"x": x})[0])


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    model = load(linear(RNG.standard_normal((8, 8)).astype(np.float32))).model
    with pytest.raises(OutputError, match="can't write"):
        save(model, tmp_path / "missing" / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_versions_outside_the_range_are_refused() -> None:
    model = linear(RNG.standard_normal((8, 8)).astype(np.float32))
    model.opset_import[0].version = 6
    with pytest.raises(ModelError, match="uses opset 6, the oldest supported is 7"):
        load(model)


def test_names_are_handed_out_once() -> None:
    names = Names(ir.from_proto(linear(np.ones((3, 3), np.float32), name="fc")))
    assert [names.unused(n) for n in ("fc", "w", "new", "new")] == ["fc_1", "w_1", "new", "new_1"]
