"""Reading models: every way in, external data, and what is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxlr.errors import ModelError
from onnxlr.model.constants import count_params
from onnxlr.model.load import load
from tests.support.builders import linear

RNG = np.random.default_rng(0)


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


def test_sparse_initializers_are_refused_by_name() -> None:
    model = linear(np.ones((3, 3), np.float32))
    values = onnx.numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "sparse")
    indices = onnx.numpy_helper.from_array(np.array([0, 4], np.int64), "sparse_i")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3, 3]))
    with pytest.raises(ModelError, match="stores 'sparse' as a sparse initializer"):
        load(model)


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


def test_versions_outside_the_range_are_refused() -> None:
    model = linear(RNG.standard_normal((8, 8)).astype(np.float32))
    model.opset_import[0].version = 6
    with pytest.raises(ModelError, match="uses opset 6, the oldest supported is 7"):
        load(model)


def test_inputs_that_share_a_name_are_refused() -> None:
    model = linear(np.ones((6, 4), np.float32))
    model.graph.input.append(onnx.helper.make_tensor_value_info("x", 1, [4, 6, 2]))
    with pytest.raises(ModelError, match="2 of its inputs are called 'x'"):
        load(model)
