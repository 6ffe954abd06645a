"""What is fitted to data in whole runs, and what is said where something isn't."""

from pathlib import Path

import numpy as np
import pytest

import onnxlr
from tests.support.builders import make_model, node, run
from tests.support.pass_cases import rand


def test_what_is_fitted_to_the_weight_alone_says_why(tmp_path: Path) -> None:
    """A weight that multiplies from both sides has two kinds of inputs."""
    nodes = [node("MatMul", ["x", "w"], "h", "first"), node("MatMul", ["w", "h"], "y", "second")]
    model = make_model(nodes, {"x": (16, 16)}, ["y"], {"w": rand(16, 16)})
    data = tmp_path / "x.npy"
    np.save(data, np.random.default_rng(1).standard_normal((320, 16)).astype(np.float32))
    result = onnxlr.optimize(
        model, data=data, rank=4, max_drop=1, metric="rel-error", target="params"
    )
    (decision,) = result.plan.replaced
    assert decision.reason.endswith(
        "fitted to the weight: the nodes that use it multiply it from both sides"
    )
    assert decision.output_error is None


@pytest.mark.parametrize("kind", ["wide", "experts", "table"])
def test_a_plan_replays_to_the_byte_and_loses_less_than_without_data(
    kind: str, tmp_path: Path
) -> None:
    """A Gemm of 5,000 inputs, a stack of matrices and a table of entries."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((8, 5000)) * 3.0 ** -np.arange(8)[:, None]
    few = (rng.standard_normal((400, 8)) @ mixing).astype(np.float32)
    few += 0.01 * rng.standard_normal(few.shape).astype(np.float32)
    if kind == "wide":
        made = node("Gemm", ["x", "w"], "y", "fc")
        model = make_model([made], {"x": ("n", 5000)}, ["y"], {"w": rand(5000, 24)})
        rows = few
    elif kind == "experts":
        made = node("MatMul", ["x", "w"], "y", "fc")
        model = make_model([made], {"x": ("n", 3, 1, 40)}, ["y"], {"w": rand(3, 40, 30)})
        rows = few[:, :120].reshape(400, 3, 1, 40)
    else:
        nodes = [node("Cast", ["x"], "i", to=7), node("Gather", ["w", "i"], "y", "fc")]
        model = make_model(nodes, {"x": ("n", 6)}, ["y"], {"w": rand(50, 30)})
        rows = np.minimum(rng.geometric(0.3, (400, 6)) - 1, 49).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    lost = []
    for without in ((), ("data",)):
        result = onnxlr.optimize(
            *(model, None),
            data=tmp_path / "x.npy",
            rank=4,
            max_drop=1,
            metric="rel-error",
            target="params",
            without=without,
        )
        assert [d.rank for d in result.plan.replaced] == [(4,)]
        again = onnxlr.apply(result.plan, model)
        assert again.SerializeToString() == result.model.SerializeToString()
        whole, part = (run(m, {"x": rows[-200:]})[0] for m in (model, result.model))
        lost.append(float(np.linalg.norm(whole - part) / np.linalg.norm(whole)))
        if not without:
            (decision,) = result.plan.replaced
            told = decision.output_error
            assert told is not None
            # About its mean, but for the table, whose entries have none.
            base = np.linalg.norm(whole if kind == "table" else whole - whole.mean(axis=0))
            assert told == pytest.approx(np.linalg.norm(whole - part) / base, rel=0.25)
    assert lost[0] < 0.9 * lost[1]
