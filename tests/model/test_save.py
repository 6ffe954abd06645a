"""Writing models: weights inside or beside the file, and nothing where writing fails."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxlr
from onnxlr.errors import OutputError
from onnxlr.model.load import load
from onnxlr.model.place import move_into_place
from onnxlr.model.protobuf import all_tensors
from onnxlr.model.save import save
from onnxlr.system.files import workspace
from tests.support.builders import linear, low_rank, node, relative, run

RNG = np.random.default_rng(0)


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
    """The working folder holds the data of another model under the same name."""
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
