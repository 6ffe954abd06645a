"""The jobs on OpenVINO, a provider that compiles; skipped where ONNX Runtime doesn't offer it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxlr
from onnxlr.errors import ModelError, RuntimeMissingError
from onnxlr.system.cache import cache_place
from onnxlr.system.entries import find_entries
from onnxlr.system.session import Machine, Session
from tests.support.builders import low_rank, make_model, node

pytestmark = pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs onnxruntime-openvino",
)


def network(*, with_determinant: bool = False) -> onnx.ModelProto:
    """Two products of rank 8, and in between, if asked for, what OpenVINO doesn't know."""
    rng = np.random.default_rng(0)
    weights = {name: low_rank(rng, 256, 256, 8) for name in "ab"}
    nodes = [node("MatMul", ["x", "a"], "h", "first")]
    if with_determinant:
        weights["shape"] = np.array([16, 16], np.int64)
        nodes += [
            node("Reshape", ["h", "shape"], "square", "reshape"),
            node("Det", ["square"], "d", "determinant"),
            node("Add", ["h", "d"], "g", "add"),
        ]
    nodes.append(node("MatMul", ["g" if with_determinant else "h", "b"], "y", "second"))
    return make_model(nodes, {"x": (1, 256)}, ["y"], weights)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(network(), path)
    return path


@pytest.mark.usefixtures("trials")
def test_optimize_compare_and_bench(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = onnxlr.optimize(path, out, rank="exact", provider="openvino", target="latency")
    report = result.report.to_dict()
    assert report["speed"]["provider"] == "openvino"
    assert any("openvino took" in note for note in report["notes"])
    pair = onnxlr.compare(path, out, provider="OpenVINOExecutionProvider")
    assert pair.quality.fidelity.rel_error < 1e-3
    assert pair.machine == Machine("openvino")
    timed = onnxlr.bench(path, provider=["openvino", "cpu"], provider_option="device_type=CPU")
    assert timed.machine.options == (("openvino", (("device_type", "CPU"),)),)
    assert timed.a.median_ms > 0


def test_what_is_compiled_is_kept_and_taken_again(path: Path) -> None:
    x = {"x": np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)}
    first = Session(path, Machine("openvino")).run(x)["y"]
    cache, _ = cache_place()
    assert cache is not None
    (entry,) = find_entries(cache)
    assert (entry.kind, entry.nbytes > 0) == ("engines", True)
    np.testing.assert_array_equal(Session(path, Machine("openvino")).run(x)["y"], first)
    assert len(find_entries(cache)) == 1


def test_a_part_that_falls_back_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(network(with_determinant=True), path)
    words = r"1 node would run on the CPU in place of openvino, Det 'determinant'"
    with pytest.raises(ModelError, match=words):
        onnxlr.bench(path, provider="openvino")
    assert onnxlr.bench(path, provider="openvino,cpu").a.median_ms > 0


def test_options_that_it_refuses(path: Path) -> None:
    with pytest.raises(ModelError, match="Invalid OpenVINO EP option: bogus"):
        onnxlr.bench(path, provider="openvino", provider_option="bogus=1")
    with pytest.raises(RuntimeMissingError, match="Number of threads should be a number"):
        onnxlr.bench(path, provider="openvino", provider_option="num_of_threads=x")
