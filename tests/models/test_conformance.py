"""Backend tests of the ``onnx`` package through optimize: a few of what models.conformance does."""

from functools import cache

import numpy as np
import pytest

import onnxlr
from models.conformance.cases import (
    Case,
    Material,
    data_cases,
    light_cases,
    node_cases,
)
from models.conformance.command import Outcome, check, runtime_opset, together
from models.conformance.nets import net_cases
from onnxlr.system.runtime import runtime_reason
from tests.support.builders import low_rank, make_model, node

FILES = {case.name: case for case in data_cases()}
LIGHT = {case.name: case for case in light_cases(())}
NETS = {case.name: case for case in net_cases(())}


@cache
def single_operators() -> dict[str, Case]:
    """The cases of single operators by name: it takes long, so that collecting tests makes none."""
    return {case.name: case for case in node_cases()}


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("test_conv_with_strides_padding", "factorized"),
        ("test_convtranspose_pads (low rank)", "factorized"),
        ("test_gather_1 (first, low rank)", "factorized"),
        ("test_gemm_all_attributes (low rank)", "factorized"),
        ("test_gemm_transposeB (first, low rank)", "factorized"),
        ("test_lstm_defaults", "factorized"),
        ("test_matmul_4d (low rank)", "factorized"),
        ("test_einsum_batch_matmul", "factorized"),
        ("test_qlinearconv", "kept"),
        ("test_relu", "plain"),
        ("test_reshape_allowzero_reordered", "plain"),  # its input is empty
        ("test_sequence_insert_at_back", "refused"),
    ],
)
def test_single_operators(name: str, verdict: str) -> None:
    assert told(check(single_operators()[name])) == verdict


@pytest.mark.parametrize("opset", [None, 7, runtime_opset()])
def test_files_of_the_oldest_opsets(opset: int | None) -> None:
    # As they come they are too old; converted they are not.
    for name in ("test_Linear", "test_Conv2d_groups", "test_ConvTranspose2d"):
        case = FILES[name]
        verdict = told(check(Case(name, case.group, case.make, opset)))
        assert verdict == ("refused" if opset is None else "factorized")


@pytest.mark.parametrize("opset", [7, 13, runtime_opset()])
@pytest.mark.parametrize("name", ["convs", "lookup", "products"])
def test_networks_at_opsets(name: str, opset: int) -> None:
    outcomes = check(Case(name, "networks", NETS[name].make, opset))
    verdicts = dict.fromkeys(("full", "exact", "expand", "drop", "half"), "factorized")
    if name == "lookup":  # factors that are fitted to one of its two inputs fail on the other
        verdicts["drop"] = "kept"
    assert {o.way: o.verdict for o in outcomes} == verdicts


def test_a_light_cnn() -> None:
    case = LIGHT["squeezenet"]
    kept = check(Case(case.name, case.group, case.make, None, ("exact", "drop", "half")))
    assert [o.verdict for o in kept] == ["kept"] * 3
    result = onnxlr.optimize(case.make().model, rank="exact", measure=False)
    reasons = {d.reason for d in result.plan.decisions}
    (reason,) = reasons
    assert reason.startswith("ConstantOfShape '(unnamed)' computes the weight from constants, and")
    planted = LIGHT["squeezenet (low rank)"]
    (outcome,) = check(Case(planted.name, planted.group, planted.make, None, ("exact",)))
    assert (outcome.verdict, outcome.replaced) == ("factorized", 26)


def test_a_vector_before_the_data_is_kept() -> None:
    weights = {"w": np.ones(4, np.float32), "v": low_rank(np.random.default_rng(0), 6, 6, 1)}
    nodes = [node("MatMul", ["x", "v"], "h", "fc"), node("MatMul", ["w", "h"], "y", "sum")]
    x = np.random.default_rng(1).standard_normal((3, 4, 6)).astype(np.float32)
    material = Material(make_model(nodes, {"x": (3, 4, 6)}, ["y"], weights), ({"x": x},))
    outcomes = check(Case("vector", "ours", lambda: material, None, ("full", "exact", "drop")))
    assert {o.verdict for o in outcomes} <= {"factorized", "kept"}
    assert {o.layers for o in outcomes} == {2}


def test_the_runtime_s_reason_is_told_without_its_source_code() -> None:
    place = "/src/core/graph/model.cc:256 a::Model::Model(b&&, const c::Path&, const c::Logger&) "
    error = Exception(f"[ONNXRuntimeError] : 1 : FAIL : Load failed:{place}Unsupported IR (14)")
    assert runtime_reason(error) == "Load failed:Unsupported IR (14)"
    place = "/src/rnn.h:48 RNN<T>::RNN(const Info&) [with T = float] "
    assert runtime_reason(Exception(f"[ONNXRuntimeError] : 6 : BAD : {place}layout was false")) == (
        "layout was false"
    )


def test_a_wrong_factor_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxlr.decompose import svd

    right = svd.truncated_svd

    def wrong(*args: object, **named: object) -> object:
        p, q = right(*args, **named)  # type: ignore[arg-type]
        return 1.01 * p, q

    monkeypatch.setattr("onnxlr_passes.svd.truncated_svd", wrong)
    outcome = together(check(single_operators()["test_matmul_2d (low rank)"]))
    assert outcome.verdict == "failed"
    assert "svd at rank (1,): outputs are off by 1.00e-02" in outcome.note


def told(outcomes: list[Outcome]) -> str:
    """The verdict, with the note where it is a failure."""
    outcome = together(outcomes)
    return outcome.note if outcome.verdict == "failed" else outcome.verdict
