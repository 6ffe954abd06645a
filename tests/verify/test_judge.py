"""Metrics and fidelity against the same numbers computed by hand."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from scipy.special import rel_entr, softmax

import onnxlr
from onnxlr.errors import DataError, ModelError, UsageError
from onnxlr.model.load import load
from onnxlr.prepare.inputs import input_specs
from onnxlr.prepare.samples import Samples, load_samples
from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.verify.judge import Judge
from onnxlr.verify.user_metric import UserMetric
from tests.support.builders import linear, low_rank, make_model, node

RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 4)).astype(np.float32)
V = (W + 0.3 * RNG.standard_normal((6, 4))).astype(np.float32)
X = (RNG.standard_normal((37, 6)) + 2).astype(np.float32)


def session(weight: np.ndarray, rows: int | str = "n") -> Session:
    return Session(linear(weight, rows=rows).SerializeToString(), ONE_CPU_THREAD)


@pytest.fixture(params=["n", 5])
def samples(tmp_path: Path, request: pytest.FixtureRequest) -> Samples:
    wrong = np.arange(37) % 3 == 0
    np.savez(tmp_path / "d.npz", x=X, label=((X @ W).argmax(1) + wrong) % 4)
    specs = input_specs(load(linear(W, rows=request.param)).model)
    return load_samples(tmp_path / "d.npz", specs, "label")


def rows_of(samples: Samples) -> int | str:
    return samples.specs[0].fixed_batch or "n"


@pytest.mark.parametrize("shape", [(0, 4, 1, 1), (0, 1, 1, 4), (0, 4, 1, 1, 1)])
def test_maps_of_one_pixel_are_vectors(samples: Samples, shape: tuple[int, ...]) -> None:
    """As SqueezeNet gives its classes, which nothing flattens behind the pooling."""
    rows = rows_of(samples)

    def mapped(weight: np.ndarray) -> Session:
        nodes = [node("MatMul", ["x", "w"], "s"), node("Reshape", ["s", "shape"], "y")]
        stored = {"w": weight, "shape": np.array(shape)}
        model = make_model(nodes, {"x": [rows, 6]}, ["y"], stored)
        return Session(model.SerializeToString(), ONE_CPU_THREAD)

    judge = Judge(mapped(W), samples, None)
    assert judge.metric == "top1"
    quality, flat = judge.judge(mapped(V)), Judge(session(W, rows), samples, None)
    expected = flat.judge(session(V, rows))
    assert (quality.original, quality.optimized) == (expected.original, expected.optimized)
    assert quality.fidelity == expected.fidelity
    assert quality.fidelity.divergence is not None


@pytest.mark.parametrize("shape", [(0, 2, 2, 1), (0, 2, 1, 2), (0, 4, 1)])
def test_maps_of_more_pixels_are_no_vectors(samples: Samples, shape: tuple[int, ...]) -> None:
    nodes = [node("MatMul", ["x", "w"], "s"), node("Reshape", ["s", "shape"], "y")]
    model = make_model(
        nodes, {"x": [rows_of(samples), 6]}, ["y"], {"w": W, "shape": np.array(shape)}
    )
    opened = Session(model.SerializeToString(), ONE_CPU_THREAD)
    unlabelled = replace(samples, labels=None)
    assert Judge(opened, unlabelled, None).metric == "rel-error"
    assert not Judge(opened, unlabelled, None).has_class_vector


@pytest.mark.parametrize("metric", ["rel-error", "cosine"])
def test_outputs_beyond_all_numbers_are_judged(samples: Samples, metric: str) -> None:
    """Without a warning, which tests make an error; means and deviations stay finite."""
    rows = rows_of(samples)
    model = linear(np.full((6, 4), 1e200), rows=rows, dtype="float64")
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    model.graph.node.insert(0, node("Cast", ["x"], "wide", to=onnx.TensorProto.DOUBLE))
    model.graph.node[1].input[0] = "wide"
    huge = Session(model.SerializeToString(), ONE_CPU_THREAD)
    small = session(W, rows)
    for original, candidate in ((small, huge), (huge, small)):
        quality = Judge(original, samples, metric).judge(candidate)
        assert all(np.isfinite(item.mean) and np.isfinite(item.noise) for item in quality.losses)
        assert quality.drop > 0.01


def test_what_is_as_before_loses_zero_and_no_less(samples: Samples) -> None:
    original = session(W, rows_of(samples))
    quality = Judge(original, samples, "rel-error").judge(original)
    assert f"{quality.drop:g}" == "0"


def test_all_numbers_by_hand(samples: Samples) -> None:
    judge = Judge(session(W, rows_of(samples)), samples, None)
    quality = judge.judge(session(V, rows_of(samples)))
    y, z = (X.astype(np.float64) @ w.astype(np.float64) for w in (W, V))
    label = samples.labels
    assert quality.metric == "top1"
    assert quality.original == np.mean(y.argmax(1) == label)
    assert quality.optimized == np.mean(z.argmax(1) == label)
    assert quality.drop == pytest.approx(quality.original - quality.optimized)
    error = np.linalg.norm(y - z) / np.linalg.norm(y - y.mean(0))
    assert quality.fidelity.rel_error == pytest.approx(error, rel=1e-5)
    cosine = np.vdot(y, z) / np.linalg.norm(y) / np.linalg.norm(z)
    assert quality.fidelity.cosine == pytest.approx(cosine, rel=1e-6)
    assert quality.fidelity.agreement == np.mean(y.argmax(1) == z.argmax(1))
    p, q = (softmax(a, axis=1) for a in (y, z))
    assert quality.fidelity.divergence == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-5)


def test_probabilities_are_taken_as_they_are(samples: Samples) -> None:
    def probable(weight: np.ndarray) -> Session:
        nodes = [node("MatMul", ["x", "w"], "s"), node("Softmax", ["s"], "y", axis=1)]
        rows = rows_of(samples)
        model = make_model(nodes, {"x": [rows, 6]}, ["y"], {"w": weight})
        return Session(model.SerializeToString(), ONE_CPU_THREAD)

    fidelity = Judge(probable(W), samples, None).judge(probable(V)).fidelity
    scores = Judge(session(W, rows_of(samples)), samples, None).judge(session(V, rows_of(samples)))
    assert fidelity.divergence == pytest.approx(scores.fidelity.divergence, rel=1e-3)


@pytest.mark.parametrize(
    ("metric", "original", "value"),
    [
        ("agreement", 1.0, lambda q: q.fidelity.agreement),
        ("rel-error", 0.0, lambda q: q.fidelity.rel_error),
        ("cosine", 1.0, lambda q: 1 - q.losses[0].mean),
    ],
)
def test_named_metrics(
    samples: Samples, metric: str, original: float, value: Callable[[Any], float]
) -> None:
    quality = Judge(session(W, rows_of(samples)), samples, metric).judge(
        session(V, rows_of(samples))
    )
    assert quality.original == original
    assert quality.optimized == value(quality)
    assert quality.drop == pytest.approx(abs(original - value(quality)))
    assert quality.drop > 0
    if metric == "rel-error":  # the mean of squares, in the unit of the metric
        assert quality.losses[0].mean == pytest.approx(quality.drop)


def test_a_cosine_is_that_of_each_sample(samples: Samples) -> None:
    quality = Judge(session(W, rows_of(samples)), samples, "cosine").judge(
        session(V, rows_of(samples))
    )
    x = np.concatenate([feed["x"][: len(index)] for feed, index, _ in samples.batches()])
    before, after = (x.astype(np.float64) @ w for w in (W, V))
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosines = (before * after).sum(axis=1) / norms
    assert quality.optimized == pytest.approx(cosines.mean(), rel=1e-5)
    np.testing.assert_allclose(np.sort(quality.losses[0].values), np.sort(1 - cosines), atol=1e-5)


def test_the_original_is_perfect(samples: Samples) -> None:
    original = session(W, rows_of(samples))
    quality = Judge(original, samples, None).judge(original)
    assert quality.drop == 0.0
    assert quality.fidelity.rel_error == 0.0
    assert quality.fidelity.cosine == pytest.approx(1.0, abs=1e-15)
    assert quality.fidelity.agreement == 1.0


def test_nan_is_an_infinite_loss(samples: Samples) -> None:
    broken = W.copy()
    broken[0, 0] = np.inf
    quality = Judge(session(W, rows_of(samples)), samples, "rel-error").judge(
        session(broken, rows_of(samples))
    )
    assert quality.drop == float("inf")


def test_past_the_memory_budget_the_original_runs_again(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Judge(session(W, rows_of(samples)), samples, None).judge(session(V, rows_of(samples)))
    monkeypatch.setattr("onnxlr.verify.judge._REFERENCE_BUDGET", 0)
    again = Judge(session(W, rows_of(samples)), samples, None).judge(session(V, rows_of(samples)))
    assert again == kept


def test_synthetic_inputs_say_little_of_arg_max() -> None:
    judge = Judge(session(W), [{"x": X}], None)
    assert (judge.metric, judge.choice.max_drop) == ("rel-error", 0.05)


def found_where(axis: int) -> Session:
    """A model whose output has only the rows, or columns, of which the sum is positive."""
    nodes = [
        node("MatMul", ["x", "w"], "z"),
        node("ReduceSum", ["z", "over"], "sum", keepdims=0),
        node("Greater", ["sum", "zero"], "taken"),
        node("Compress", ["z", "taken"], "y", axis=axis),
    ]
    weights = {"w": W, "over": np.array([1 - axis]), "zero": np.zeros((), np.float32)}
    model = make_model(nodes, {"x": [5, 6]}, ["y"], weights)
    return Session(model.SerializeToString(), ONE_CPU_THREAD)


@pytest.mark.parametrize("samples", [5], indirect=True)
@pytest.mark.parametrize("axis", [0, 1])
def test_outputs_whose_shape_depends_on_the_input(samples: Samples, axis: int) -> None:
    """A detector gives as many boxes as there are, and perhaps none."""
    flat = replace(samples, parts=({"x": np.where(np.arange(37)[:, None] < 9, X, -X)},))
    original = found_where(axis)
    with pytest.raises(DataError, match=r"top1 needs an output of shape \(batch, classes\)"):
        Judge(original, flat, "top1")
    judge = Judge(original, flat, None)
    assert judge.metric == "rel-error"
    assert "the labels aren't used" in judge.choice.because
    assert judge.judge(original).fidelity.rel_error == 0.0
    other = session(np.hstack([W, W[:, :1]]), 5)  # of other shapes throughout
    assert judge.judge(other).drop == float("inf")
    agreement = Judge(session(W, 5), replace(samples, labels=None), "agreement").judge(other)
    assert agreement.optimized == 0.0


def test_a_model_that_answers_in_words() -> None:
    nodes = [
        node("ArgMax", ["x"], "class", axis=1, keepdims=0),
        onnx.helper.make_node(
            "LabelEncoder",
            ["class"],
            ["y"],
            domain="ai.onnx.ml",
            keys_int64s=range(6),
            values_strings=list("abcdef"),
        ),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "test",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.STRING, ["n"])],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("ai.onnx.ml", 3)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    with pytest.raises(ModelError, match=r"no output that is a tensor of numbers.*--verify none"):
        Judge(Session(model.SerializeToString(), ONE_CPU_THREAD), [{"x": X}], None)


def test_nothing_but_infinities_is_no_reference() -> None:
    """The outputs of a ruined model are infinite as well, and mustn't be agreed with."""
    broken = linear(low_rank(RNG, 64, 48, 3), rows="n")
    result = onnxlr.optimize(broken, rank=3, max_drop=1, measure=False)
    assert result.plan.replaced
    broken.graph.node.append(node("Div", ["y", "zero"], "z"))
    broken.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    broken.graph.output[0].name = "z"
    result = onnxlr.optimize(broken, rank=3, max_drop=1, measure=False)
    assert not result.plan.replaced
    assert "nothing but NaN and infinities" in result.plan.decisions[0].reason


@pytest.mark.parametrize("shift", [-1, 4])
def test_labels_that_are_no_classes(samples: Samples, shift: int) -> None:
    assert samples.labels is not None
    moved = replace(samples, labels=samples.labels + shift)
    with pytest.raises(DataError, match=r"has the classes 0 to 3: shift the labels"):
        Judge(session(W, rows_of(samples)), moved, None)


def test_labels_of_another_model_are_not_used(samples: Samples) -> None:
    assert samples.labels is not None
    moved = replace(samples, labels=(samples.labels + 1) % 4)
    judge = Judge(session(W, rows_of(samples)), moved, None)
    assert judge.metric == "agreement"
    assert "the labels aren't used: the original gets no more of them" in judge.choice.because


def test_a_single_constant_sample_is_measured_against_its_own_size() -> None:
    x = np.ones((1, 6), np.float32)
    quality = Judge(session(W), [{"x": x}], "rel-error").judge(
        session((W * 1.1).astype(np.float32))
    )
    y = x @ W
    expected = 0.1 * np.linalg.norm(y) / np.linalg.norm(y - y.mean())
    assert quality.fidelity.rel_error == pytest.approx(expected, rel=1e-4)


def test_a_function_of_the_user_s(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my_metric.py").write_text(
        "import numpy as np\n"
        "def first(session):\n"
        "    n = session.get_inputs()[0].shape[0]\n"
        "    x = np.ones((n if isinstance(n, int) else 1, 6), np.float32)\n"
        "    return session.run(None, {'x': x})[0][0, 0]\n"
    )
    monkeypatch.chdir(tmp_path)
    quality = Judge(session(W, rows_of(samples)), samples, "my_metric:first").judge(
        session(V, rows_of(samples))
    )
    assert quality.original == pytest.approx(W[:, 0].sum(), rel=1e-5)
    assert quality.drop == pytest.approx(float(W[:, 0].sum() - V[:, 0].sum()), rel=1e-4)


def test_a_model_that_chose_is_not_measured_anew_to_be_tested(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "each_row.py").write_text(
        "import numpy as np\n"
        "calls = 0\n"
        "def first(session):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    x = np.eye(6, dtype=np.float32)\n"
        "    return np.array([session.run(None, {'x': row[None]})[0][0, 0] for row in x])\n"
    )
    monkeypatch.chdir(tmp_path)
    original, first = session(W), Judge(session(W), [{"x": X}], UserMetric("each_row:first"))
    chosen_by = UserMetric("each_row:first", "choose")
    choose = Judge(original, [{"x": X}], chosen_by)
    test = Judge(original, [{"x": X}], chosen_by.of_part("test"))
    module = importlib.import_module("each_row")
    parts = [judge.judge(session(V), "V") for judge in (choose, test)]
    assert module.calls == 2  # of the original and of the candidate
    whole = first.judge(session(V))
    assert module.calls == 4
    assert parts[0].optimized != parts[1].optimized
    assert np.mean([p.optimized for p in parts]) == pytest.approx(whole.optimized)
    assert np.mean([p.original for p in parts]) == pytest.approx(whole.original)
    other = test.judge(session(2 * V), "2V")
    assert module.calls == 5
    assert other.optimized == pytest.approx(2 * parts[1].optimized)
    assert test.judge(original).drop == 0.0
    assert module.calls == 5


COMPARING = """
import numpy as np
X = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
BEFORE = X @ np.load({weight!r})
def outputs(session):
    return np.concatenate([session.run(None, {{"x": x[None]}})[0] for x in X])
def close(session):
    return 1 / (1 + np.abs(outputs(session) - BEFORE).mean(axis=1).round(4))
def same(session):
    return outputs(session).argmax(axis=1) == BEFORE.argmax(axis=1)
def strict(session):
    assert type(session).__name__ == "InferenceSession"
    return close(session)
def bound(session):
    binding = session.io_binding()
    return np.ones(len(X)) if binding is not None else None
"""


@pytest.mark.parametrize(
    ("function", "kind"),
    [("close", "differences"), ("same", "pairs"), ("strict", "pairs"), ("bound", "pairs")],
)
def test_whether_samples_may_be_right_in_part_is_found_out(
    function: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compared with itself, the original has only ones by any of them."""
    np.save(tmp_path / "w.npy", W)
    name = f"comparing_{function}"
    (tmp_path / f"{name}.py").write_text(COMPARING.format(weight=str(tmp_path / "w.npy")))
    monkeypatch.chdir(tmp_path)
    judge = Judge(session(W), [{"x": X}], UserMetric(f"{name}:{function}", "choose"))
    assert judge.kind == kind
    quality = judge.judge(session(W))
    assert quality.original == quality.optimized == 1.0


def test_what_a_metric_needs_is_said() -> None:
    with pytest.raises(DataError, match="top1 needs labels"):
        Judge(session(W), [{"x": X}], "top1")
    with pytest.raises(UsageError, match="'psnr' is unknown"):
        Judge(session(W), [{"x": X}], "psnr")
    with pytest.raises(UsageError, match="can't be imported"):
        Judge(session(W), [{"x": X}], "no_such_module:f")


def test_an_axis_that_is_not_samples_is_not_averaged_over(tmp_path: Path) -> None:
    # A recurrent state: two layers first, one sample a run. Their difference is no spread.
    x = np.random.default_rng(3).standard_normal((9, 2, 6)).astype(np.float32)
    x[:, 1] += 50
    np.savez(tmp_path / "d.npz", x=x)
    whole = load_samples(tmp_path / "d.npz", input_specs(load(linear(W, rows=2)).model), None)
    quality = Judge(session(W, 2), whole, "rel-error").judge(session(V, 2))
    y, z = (x.astype(np.float64) @ w.astype(np.float64) for w in (W, V))
    expected = np.linalg.norm(y - z) / np.linalg.norm(y - y.mean(0))
    assert quality.fidelity.rel_error == pytest.approx(expected, rel=1e-5)
