"""The ready-made steps: what they make of a network, in silence, and names that are none."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxlr.behind import ready
from onnxlr.behind.ready import READY
from onnxlr.behind.step import Behind, parse_behind
from onnxlr.errors import ModelError, UsageError
from onnxlr.system.session import Feed
from tests.support.builders import Array, make_model, node, relative

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 6, 8, 8)).astype(np.float32)
# Seven bits: steps of 1.6% of the largest value, some 3 deviations, are 1.4% of noise each time.
TOLERANCE = {"int8-dynamic": 0.05, "int8-static": 0.05, "fp16": 2e-3}
# Types of weights, and the largest number in each: seven bits are used to the full.
STORED = {
    "int8-dynamic": (onnx.TensorProto.UINT8, 127),
    "int8-static": (onnx.TensorProto.INT8, 64),
    "fp16": (onnx.TensorProto.FLOAT16, None),
}


def network(opset: int = 17) -> onnx.ModelProto:
    weights = {
        "k": RNG.standard_normal((8, 6, 3, 3)) / 7,
        "b": RNG.standard_normal(8),
        "g": RNG.standard_normal((16, 8)),
        "gb": RNG.standard_normal(16),
        "m": RNG.standard_normal((16, 200)),  # tensors below 1 kB are never outside
    }
    return make_model(
        [
            node("Conv", ["x", "k", "b"], "c", "conv", pads=[1, 1, 1, 1]),
            node("Relu", ["c"], "r"),
            node("GlobalAveragePool", ["r"], "p"),
            node("Flatten", ["p"], "f"),
            node("Gemm", ["f", "g", "gb"], "h", "gemm", transB=1),
            node("MatMul", ["h", "m"], "y", "product"),
        ],
        {"x": ("n", 6, 8, 8)},
        ["y"],
        {name: w.astype(np.float32) for name, w in weights.items()},
        opset=opset,
    )


def feeds() -> Iterator[Feed]:
    yield from ({"x": X[i : i + 4]} for i in range(0, len(X), 4))


def output(path: Path) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("name", list(READY))
def test_a_step_makes_another_file_of_the_same_function(
    name: str, opset: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network(opset), path)
    before = path.read_bytes()
    made = Behind(name).apply(path, "the model", feeds)
    assert path.read_bytes() == before
    assert made.parent == tmp_path
    weights = [t for t in onnx.load(made).graph.initializer if len(t.dims) > 1]
    narrow, most = STORED[name]
    assert {t.data_type for t in weights} == {narrow}
    if most is not None:
        assert {int(abs(onnx.numpy_helper.to_array(t)).max()) for t in weights} == {most}
    assert 0 < relative(output(path), output(made)) < TOLERANCE[name]
    assert [i.type for i in onnxruntime.InferenceSession(str(made)).get_inputs()] == [
        "tensor(float)"
    ]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", list(READY))
def test_weights_outside_stay_there_if_they_do_not_fit_into_one_file(
    name: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(ready, "_PROTOBUF_BYTES", 1)
    path = tmp_path / "model.onnx"
    onnx.save(network(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    made = Behind(name).apply(path, "the model", feeds)
    inside = onnx.load(made, load_external_data=False).graph.initializer
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in inside) is large
    copy = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, copy, ignore=lambda *_: {"model.onnx", "model.data"})
    assert relative(output(path), output(copy / made.name)) < TOLERANCE[name]


def test_a_name_that_is_none_and_a_function_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="choose from int8-dynamic, int8-static, fp16 or module:f"):
        parse_behind("int4")
    with pytest.raises(UsageError, match="--behind 'nowhere:f' can't be imported: No module named"):
        parse_behind("nowhere:f")
    with pytest.raises(UsageError, match="--behind 'math:pi' is not a function"):
        parse_behind("math:pi")
    found = parse_behind("os.path:abspath")
    assert found is not None
    assert (found.name, found.calibrates) == ("os.path:abspath", False)


@pytest.mark.parametrize("given", [None, 3, "nowhere.onnx"])
def test_what_a_function_gives_has_to_be_a_file(given: object, tmp_path: Path) -> None:
    step = parse_behind(lambda _: given)
    assert step is not None
    with pytest.raises(ModelError, match=r"gave .* for the model: it must give the path"):
        step.apply(tmp_path / "model.onnx", "the model", feeds)
