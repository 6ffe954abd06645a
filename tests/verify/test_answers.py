"""Judging what is more than real numbers: labels, rows that follow the values, random numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest

import onnxlr
from onnxlr.errors import UsageError
from onnxlr.model.load import load
from onnxlr.model.randomness import set_seeds
from onnxlr.prepare.inputs import input_specs
from onnxlr.prepare.samples import Samples, load_samples
from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.verify.judge import Judge
from tests.support.builders import Array, low_rank, make_model, node

RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 4)).astype(np.float32)
V = (W + 0.4 * RNG.standard_normal((6, 4))).astype(np.float32)
SQUARE = RNG.standard_normal((6, 6)).astype(np.float32)
X = RNG.standard_normal((37, 6)).astype(np.float32)
I64 = onnx.TensorProto.INT64


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    label = (X @ W).argmax(1)
    np.savez(tmp_path / "d.npz", x=X, label=np.where(np.arange(37) % 3, label, (label + 1) % 4))
    specs = input_specs(load(classes(W)).model)
    return load_samples(tmp_path / "d.npz", specs, "label")


def opened(model: onnx.ModelProto) -> Session:
    return Session(model.SerializeToString(), ONE_CPU_THREAD)


def classes(weight: Array, keepdims: int = 0) -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w"], "z", "fc"),
        node("ArgMax", ["z"], "y", axis=1, keepdims=keepdims),
    ]
    model = make_model(nodes, {"x": ["n", 6]}, ["y"], {"w": weight})
    model.graph.output[0].type.tensor_type.elem_type = I64
    return model


def rows_above(weight: Array, rank: int = 2) -> onnx.ModelProto:
    """Where scores are positive, as (r, 2) indices: as many as there are."""
    nodes = [
        node("MatMul", ["x", "w"], "z", "fc"),
        node("Relu", ["z"], "r"),
        node("NonZero", ["r"], "i"),
        node("Transpose", ["i"], "y"),
    ]
    model = make_model(nodes, {"x": [1, weight.shape[0]]}, ["y"], {"w": weight})
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", I64, ["found", rank]))
    return model


@pytest.mark.parametrize("keepdims", [0, 1])
def test_labels_are_judged_by_agreement_or_with_labels_by_accuracy(
    samples: Samples, keepdims: int
) -> None:
    y, z = ((X @ w).argmax(1) for w in (W, V))
    agreement = Judge(opened(classes(W, keepdims)), samples, "agreement")
    quality = agreement.judge(opened(classes(V, keepdims)))
    assert 0.3 < np.mean(y == z) < 0.95
    assert (quality.original, quality.optimized) == (1.0, np.mean(y == z))
    assert quality.fidelity.agreement == np.mean(y == z)
    assert (agreement.kind, len(quality.losses[0].values)) == ("shares", 37)
    judge = Judge(opened(classes(W, keepdims)), samples, None)
    quality = judge.judge(opened(classes(V, keepdims)))
    assert judge.metric == "top1"
    assert quality.original == np.mean(y == samples.labels)
    assert quality.optimized == np.mean(z == samples.labels)


def test_several_outputs_of_labels_count_alike(tmp_path: Path) -> None:
    def both(weight: Array) -> onnx.ModelProto:
        model = classes(weight)
        model.graph.node.append(node("Greater", ["z", "t"], "above"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "t"))
        model.graph.output.append(onnx.helper.make_tensor_value_info("above", 9, ["n", 4]))
        return model

    np.save(tmp_path / "x.npy", X)
    samples = load_samples(tmp_path / "x.npy", input_specs(load(both(W)).model), None)
    judge = Judge(opened(both(W)), samples, None)
    quality = judge.judge(opened(both(V)))
    same = (X @ W).argmax(1) == (X @ V).argmax(1)
    above = (X @ W > 0) == (X @ V > 0)
    assert judge.metric == "agreement"
    assert quality.optimized == pytest.approx((same.sum() + above.sum()) / (37 * 5))
    assert quality.losses[0].values.sum() == pytest.approx(37 - (same + above.mean(1)).sum() / 2)


def test_rows_that_follow_the_values_count_where_only_one_model_has_them(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    samples = load_samples(tmp_path / "x.npy", input_specs(load(rows_above(W)).model), None)
    judge = Judge(opened(rows_above(W)), samples, None)
    quality = judge.judge(opened(rows_above(V)))
    pairs = [[np.argwhere(x @ w > 0)[:, 0] for w in (W, V)] for x in X]
    most = [max(len(a), len(b)) for a, b in pairs]
    common = [list(zip(a, b, strict=False)) for a, b in pairs]
    same = [len(rows) + sum(i == j for i, j in rows) for rows in common]  # the first index is 0
    assert judge.metric == "agreement"
    assert not quality.fidelity.same_shapes
    assert quality.optimized == pytest.approx(sum(same) / (2 * sum(most)))
    assert judge.judge(opened(rows_above(W))).optimized == 1.0
    assert judge.may_reshape
    assert not Judge(opened(rows_above(W)), samples, "rel-error").may_reshape


def test_a_metric_of_the_users_decides_alone_where_rows_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = low_rank(RNG, 64, 48, 4) + 0.05 * RNG.standard_normal((64, 48)).astype(np.float32)
    np.save(tmp_path / "x.npy", RNG.standard_normal((12, 64)).astype(np.float32))
    (tmp_path / "found_metric.py").write_text(
        "import numpy as np\n"
        "X = np.load('x.npy')\n"
        "def found(s):\n"
        "    return [float(len(s.run(None, {'x': x[None]})[0]) > 9) for x in X]\n"
    )
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"data": "x.npy", "rank": "4", "measure": False}
    model = rows_above(noisy)
    result = onnxlr.optimize(model, metric="found_metric:found", max_drop=0.5, **options)
    assert [d.decision for d in result.plan.decisions] == ["svd"]
    assert result.report.quality is not None
    assert not result.report.quality.fidelity.same_shapes
    result = onnxlr.optimize(model, metric="rel-error", max_drop=1.0, **options)
    (decision,) = result.plan.decisions
    assert decision.decision == "keep"
    assert "an output would differ in shape, which only a metric of yours" in decision.reason


def test_models_with_other_classes_are_not_compared_and_those_with_other_rows_are() -> None:
    other = rows_above(np.hstack([W, W]), rank=2)
    result = onnxlr.compare(rows_above(W), other)
    assert not result.quality.fidelity.same_shapes
    with pytest.raises(UsageError, match="compare models with outputs of one shape"):
        onnxlr.compare(classes(W, keepdims=1), classes(W, keepdims=0))


RANDOM = {
    "RandomNormalLike": [
        node("RandomNormalLike", ["h"], "z", scale=0.7),
        node("Add", ["h", "z"], "g"),
    ],
    "RandomUniform": [node("RandomUniform", [], "z", shape=[1, 32]), node("Mul", ["h", "z"], "g")],
    "seeded": [node("RandomNormalLike", ["h"], "z", seed=3.0), node("Add", ["h", "z"], "g")],
    "Bernoulli": [
        node("Sigmoid", ["h"], "p"),
        node("Bernoulli", ["p"], "z"),
        node("Mul", ["h", "z"], "g"),
    ],
    "twice": [
        node("RandomNormalLike", ["h"], "z"),
        node("RandomNormalLike", ["h"], "z2"),
        node("Sub", ["z", "z2"], "d"),
        node("Add", ["h", "d"], "g"),
    ],
}


def random_model(nodes: list[Any], w: Array, v: Array, function: bool = False) -> onnx.ModelProto:
    functions = []
    if function:
        imports = [onnx.helper.make_opsetid("", 17)]
        functions = [onnx.helper.make_function("local", "Noise", ["h"], ["g"], nodes, imports)]
        nodes = [onnx.helper.make_node("Noise", ["h"], ["g"], domain="local")]
    first, last = node("MatMul", ["x", "w"], "h", "a"), node("MatMul", ["g", "v"], "y", "b")
    return make_model(
        [first, *nodes, last], {"x": [4, 32]}, ["y"], {"w": w, "v": v}, functions=functions
    )


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("function", [False, True])
def test_a_random_model_is_judged_on_the_same_numbers(name: str, function: bool) -> None:
    w, v = low_rank(RNG, 32, 32, 2), low_rank(RNG, 32, 32, 2)
    model = random_model(RANDOM[name], w, v, function)
    original = opened(model)
    feeds = [{"x": RNG.standard_normal((4, 32)).astype(np.float32)} for _ in range(3)]
    judge = Judge(original, feeds, None)
    assert judge.random_line.startswith("the model is random: two runs of it")
    assert "are judged on the same random numbers" in judge.random_line
    for _ in range(2):
        assert judge.judge(original).fidelity.rel_error == 0.0
    moved = opened(random_model(RANDOM[name], w, v * np.float32(1.01)))
    # One per cent of the size, which is the more of the spread the less the samples differ.
    assert 0.0095 < judge.judge(moved).fidelity.rel_error < 0.016


def test_numbers_of_several_operators_are_others_and_functions_may_be_inlined() -> None:
    model = random_model(RANDOM["twice"], low_rank(RNG, 32, 32, 2), low_rank(RNG, 32, 32, 2))
    set_seeds(model, apart=True)
    seeds = [a.f for n in model.graph.node for a in n.attribute if a.name == "seed"]
    assert seeds == [1.0, 2.0]

    model = random_model(RANDOM["RandomNormalLike"], SQUARE, V, function=True)
    first, noise, last = model.graph.node
    del model.graph.node[:]
    again = [node("RandomUniformLike", ["g"], "u"), node("Mul", ["g", "u"], "gu")]
    last.input[0] = "gu"
    model.graph.node.extend([first, noise, *again, last])
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", 1, [4, 6]))
    inlined = onnx.inliner.inline_local_functions(model)
    assert {n.op_type for n in inlined.graph.node} >= {"RandomNormalLike", "RandomUniformLike"}
    feeds = [{"x": RNG.standard_normal((4, 6)).astype(np.float32)} for _ in range(3)]
    assert Judge(opened(model), feeds, None).judge(opened(inlined)).fidelity.rel_error == 0.0


def test_past_the_memory_budget_random_numbers_are_still_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onnxlr.verify.judge._REFERENCE_BUDGET", 0)
    model = random_model(RANDOM["twice"], low_rank(RNG, 32, 32, 2), low_rank(RNG, 32, 32, 2))
    feeds = [{"x": RNG.standard_normal((4, 32)).astype(np.float32)} for _ in range(3)]
    judge = Judge(opened(model), feeds, None)
    assert judge.judge(opened(model)).fidelity.rel_error == 0.0


def test_lossless_layers_of_a_random_model_are_replaced_and_it_is_told() -> None:
    model = random_model(
        RANDOM["RandomNormalLike"], low_rank(RNG, 32, 32, 2), low_rank(RNG, 32, 32, 2)
    )
    result = onnxlr.optimize(model, rank="exact", measure=False)
    assert [d.decision for d in result.plan.decisions] == ["svd", "svd"]
    assert any("the model is random" in note for note in result.report.notes)


def test_what_cannot_be_seeded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of other domains may draw as they like."""
    monkeypatch.setattr("onnxlr.verify.draws.Draws.begin", lambda _, session: session)
    model = random_model(RANDOM["twice"], low_rank(RNG, 32, 32, 2), low_rank(RNG, 32, 32, 2))
    feeds = [{"x": RNG.standard_normal((4, 32)).astype(np.float32)}]
    assert "random numbers can't be fixed" in Judge(opened(model), feeds, None).random_line
