"""Nodes that fall back to the CPU: which count, how they are named, and where they are read."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxlr.errors import ModelError, RuntimeMissingError
from onnxlr.system import placement, session
from onnxlr.system.native_log import native_stderr
from onnxlr.system.placement import check_placement
from onnxlr.system.session import Machine, Session
from tests.support.builders import make_model, node

CPU, OTHER = "CPUExecutionProvider", "CUDAExecutionProvider"
PREFIX = "2026-11-30 13:12:27.7016 [V:onnxruntime:, session_state.cc:1313 "
PLACED = f"{PREFIX}VerifyEachNodeIsAssignedToAnEp]"


def network() -> onnx.ModelProto:
    """A product whose result gets a shape that is computed from the input's; the best of it."""
    rng = np.random.default_rng(0)
    return make_model(
        [
            node("MatMul", ["x", "w"], "h", "product"),
            node("Shape", ["x"], "s", "shape"),
            node("Gather", ["s", "zero"], "n", "pick"),
            node("Concat", ["n", "minus"], "t", "join", axis=0),
            node("Reshape", ["h", "t"], "r", "reshape"),
            onnx.helper.make_node("TopK", ["r", "two"], ["top", "which"], "top"),
            node("Softmax", ["top"], "y", "softmax"),
        ],
        {"x": (4, 8)},
        ["y"],
        {
            "w": rng.standard_normal((8, 6)).astype(np.float32),
            "zero": np.array([0], np.int64),
            "minus": np.array([-1], np.int64),
            "two": np.array([2], np.int64),
        },
    )


def raw(*placed: tuple[str, str, str]) -> Any:
    """A session that tells where its nodes run: each by provider, operator and name."""
    parts = [
        SimpleNamespace(
            ep_name=provider,
            get_nodes=lambda op=op, name=name: [SimpleNamespace(op_type=op, name=name)],
        )
        for provider, op, name in placed
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "can_record", lambda: True)


def check(opened: Any, log: str = "", *providers: str) -> None:
    content = network().SerializeToString()
    check_placement(opened, log, content, "net.onnx", providers or ("cuda",))


@pytest.mark.usefixtures("records")
def test_arithmetic_of_shapes_on_the_cpu_is_no_fall_back() -> None:
    check(raw((OTHER, "MatMul", "product"), (OTHER, "Reshape", "reshape")))
    check(raw((CPU, "Shape", "shape"), (CPU, "Gather", "pick"), (CPU, "Concat", "join")))
    check(raw((CPU, "Gather", "made by the runtime")))  # as the Gather that is known


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("TopK", "top")], "1 node would run on the CPU in place of cuda, TopK 'top'"),
        ([("Reshape", "reshape")], "1 node would run on the CPU in place of cuda, Reshape 'resha"),
        ([("FusedConv", "made")], "1 node would run on the CPU in place of cuda, FusedConv 'made"),
        (
            [("MatMul", "product"), ("Reshape", "reshape"), ("Softmax", "softmax")],
            "3 nodes would run on the CPU in place of cuda, MatMul 'product', Reshape 'reshape', "
            "Softmax 'softmax'; --provider cuda,cpu allows it",
        ),
        (
            [("MatMul", n) for n in ("a", "b", "c", "d", "e")],
            "5 nodes would run on the CPU in place of cuda, MatMul 'a', MatMul 'b', MatMul 'c' "
            "and 2 more; --provider",
        ),
    ],
)
def test_what_computes_with_floats_is_named(nodes: list[tuple[str, str]], words: str) -> None:
    placed = raw((CPU, "Shape", "shape"), *((CPU, op, name) for op, name in nodes))
    with pytest.raises(ModelError) as caught:
        check(placed)
    assert f"net.onnx falls back: {words}" in str(caught.value)


def test_a_runtime_that_records_nothing_has_it_in_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "can_record", lambda: False)
    some = [
        f"{PLACED}  Node(s) placed on [{OTHER}]. Number of nodes: 1",
        f"{PLACED}   Softmax (softmax)",
        f"{PLACED}  Node(s) placed on [{CPU}]. Number of nodes: 3",
        f"{PLACED}   Shape (shape)",
        f"{PLACED}   MatMul (product (of two))",
        f"{PREFIX}SaveTensors] Done (saving)",
        f"{PLACED}  Node(s) placed on [{OTHER}]. Number of nodes: 1",
        f"{PLACED}   Reshape (reshape)",
    ]
    words = r"1 node would run .*, MatMul 'product \(of two\)'; --provider tensorrt,cuda,cpu"
    with pytest.raises(ModelError, match=words):
        check(None, "\n".join(some), "tensorrt", "cuda")
    check(None, "\n".join(line for line in some if "MatMul" not in line))
    check(None, f"{PLACED}  All nodes placed on [{OTHER}]. Number of nodes: 9")
    with pytest.raises(ModelError, match=r"4 nodes would run .* MatMul 'product', Reshape"):
        check(None, f"{PLACED}  All nodes placed on [{CPU}]. Number of nodes: 9")


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs a provider that takes no node",
)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "logged"])
def test_a_session_that_falls_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recorded: bool,
) -> None:
    """ONNX Runtime's provider of remote models computes nothing itself."""
    path = tmp_path / "net.onnx"
    onnx.save(network(), path)
    if not recorded:
        for module in (placement, session):
            monkeypatch.setattr(module, "can_record", lambda: False)
    elif not placement.can_record():
        pytest.skip("this ONNX Runtime records no placement")
    with pytest.raises(ModelError, match=r"falls back: 4 nodes .* of azure, MatMul 'product', Res"):
        Session(path, Machine("azure"))
    allowed = Session(path, Machine("azure,cpu"))
    assert set(allowed.run({"x": np.zeros((4, 8), np.float32)})) == {"y"}
    assert capfd.readouterr() == ("", "")


def test_what_is_caught_is_not_printed_and_what_comes_after_is(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with native_stderr() as log:
        os.write(2, b"caught")
        assert log() == "caught"
    os.write(2, b"printed")
    assert capfd.readouterr().err == "printed"


def test_a_whole_session_that_falls_back_says_what_the_runtime_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is only logged, as where CUDA's libraries aren't there."""
    path = tmp_path / "net.onnx"
    onnx.save(network(), path)
    opened: Callable[..., Any] = onnxruntime.InferenceSession
    log = (
        b"\x1b[1;31m2026-11-30 [E:onnxruntime:Default, bridge.cc:1 Get] /src/core/bridge.cc:2 "
        b"Provider& onnxruntime::Get() [ONNXRuntimeError] : 1 : FAIL : no libcudnn.so.9\x1b[m\n"
    )

    def fallen(model: str, options: Any, **_: Any) -> Any:
        os.write(2, log)
        return opened(model, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [OTHER, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen)
    words = r"fell back from CUDAExecutionProvider to CPUExecutionProvider \(no libcudnn.so.9"
    with pytest.raises(RuntimeMissingError, match=words):
        Session(path, Machine("cuda"))
