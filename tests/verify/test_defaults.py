"""The metric that is taken where none is named, and its line, for every kind of model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from onnxlr.model.load import load
from onnxlr.prepare.prepared import simplified_model
from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.verify.defaults import (
    LIMITS,
    MetricChoice,
    choose_default,
    default_limit,
    layer_limit,
)
from onnxlr.verify.endings import endings
from onnxlr.verify.fidelity import outputs_of_numbers
from onnxlr.verify.profile import Profile
from tests.support.builders import make_model, node

Array = NDArray[Any]

RNG = np.random.default_rng(0)
ROWS = 60
IMAGES = RNG.standard_normal((ROWS, 1, 8, 8)).astype(np.float32)
FEATURES = RNG.standard_normal((ROWS, 12)).astype(np.float32)
WORDS = RNG.integers(0, 30, (ROWS, 5))


def normal(*shape: int, scale: float = 1.0) -> Array:
    """The same numbers for the same shape, whichever tests ran before."""
    return (scale * np.random.default_rng(shape).standard_normal(shape)).astype(np.float32)


def default_of(
    model: onnx.ModelProto, x: Array, labels: Array | None = None, *, synthetic: bool = False
) -> MetricChoice:
    """What is chosen on samples that are run in batches of several sizes."""
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    profiles: dict[str, Profile] = {}
    for index in np.split(np.arange(len(x)), [7, 20, 21]):
        outputs = session.run({"x": x[index]})
        for name in outputs_of_numbers(outputs):
            profile = profiles.setdefault(name, Profile(labels))
            profile.add(outputs[name], len(index), index, [x[index]])
    ends = endings(simplified_model(load(model))[0])
    return choose_default(profiles, ends, labels=labels is not None, synthetic=synthetic)


def scores_of(width: int, scale: float = 3.0, *after: Any, bias: float = 0.0) -> onnx.ModelProto:
    """A linear layer on 12 features; what follows reads ``s`` and gives ``y``."""
    weights = {"w": normal(12, width, scale=scale), "b": np.full(width, bias, np.float32)}
    nodes = [node("Gemm", ["x", "w", "b"], "s" if after else "y"), *after]
    return make_model(nodes, {"x": ["n", 12]}, ["y"], weights)


def sentences(*after: Any, outputs: Sequence[str] = ("y",)) -> onnx.ModelProto:
    """Words looked up and normalized, (n, 5, 24), as ``h``; what follows gives the outputs."""
    nodes = [
        node("Gather", ["table", "x"], "e"),
        node("MatMul", ["e", "w"], "m"),
        node("LayerNormalization", ["m", "one", "zero"], "h"),
        *after,
    ]
    weights = {
        "table": normal(30, 24),
        "w": normal(24, 24),
        "one": 1 + normal(24, scale=0.2),
        "zero": normal(24, scale=0.2),
        "half": np.full((1, 5, 1), 0.5, np.float32),
        "axis": np.array([1]),
        "last": np.array([1]),
        "two": np.array(2, np.float32),
        "least": np.array(1e-9, np.float32),
        "vocabulary": normal(24, 30),
        "narrow": normal(24, 20, scale=0.02),
    }
    model = make_model(nodes, {"x": ["n", 5]}, list(outputs), weights)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    return model


MASKED_MEAN = (
    node("Mul", ["h", "half"], "masked"),
    node("ReduceSum", ["masked", "axis"], "sum", keepdims=0),
    node("ReduceSum", ["half", "axis"], "weight", keepdims=0),
    node("Add", ["weight", "least"], "count"),
    node("Div", ["sum", "count"], "y"),
)
DECOMPOSED_L2 = (
    node("ReduceMean", ["h"], "p", axes=[1], keepdims=0),
    node("Pow", ["p", "two"], "squares"),
    node("ReduceSum", ["squares", "last"], "squared"),
    node("Sqrt", ["squared"], "length"),
    node("Clip", ["length", "least"], "safe"),
    node("Div", ["p", "safe"], "y"),
)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (sentences(*MASKED_MEAN), "an embedding of 24 numbers a sample (the pooling at its end)"),
        (sentences(*DECOMPOSED_L2), "24 numbers a sample (all of the same length)"),
        (
            sentences(node("Identity", ["h"], "y")),
            "an embedding of 24 numbers a position (the layer norm at its end)",
        ),
        (sentences(*MASKED_MEAN, outputs=("h", "y")), "all 2 outputs are embeddings"),
        (
            scores_of(40, 1.0, node("Tanh", ["s"], "y")),
            "an embedding of 40 numbers a sample (the activation at its end)",
        ),
        # A linear layer is what class scores have as well, but these single out no class.
        (
            scores_of(40, 0.02),
            "an embedding of 40 numbers a sample (no class stands out: softmax 0% above chance)",
        ),
    ],
)
def test_embeddings_are_judged_by_cosine(model: onnx.ModelProto, line: str) -> None:
    x = WORDS if model.graph.input[0].type.tensor_type.elem_type == 7 else FEATURES
    chosen = default_of(model, x)
    assert chosen.name == "cosine"
    assert chosen.max_drop == LIMITS["cosine"]
    assert line in chosen.because


def test_labels_beside_an_embedding_are_not_used_and_why() -> None:
    labels = np.arange(ROWS) % 8
    chosen = default_of(sentences(*DECOMPOSED_L2), WORDS, labels)
    assert chosen.name == "cosine"
    assert chosen.because.endswith(
        "; the labels aren't used: its arg-max has nothing to do with them"
    )


def test_pooled_scores_that_labels_fit_are_class_scores() -> None:
    """A net of convolutions alone has no linear layer, and ends in a pooling too."""
    model = sentences(*MASKED_MEAN)
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    labels = session.run({"x": WORDS})["y"].argmax(1)
    labels[::3] = (labels[::3] + 1) % 24
    assert default_of(model, WORDS, labels).name == "top1"


def test_embeddings_that_all_point_the_same_way() -> None:
    model = scores_of(40, 0.02, node("Tanh", ["s"], "y"), bias=0.5)
    chosen = default_of(model, FEATURES)
    assert (chosen.name, chosen.max_drop) == ("rel-error", LIMITS["rel-error"])
    assert "all point nearly the same way, so cosine says little" in chosen.because


SOFTMAX = node("Softmax", ["s"], "y", axis=1)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (scores_of(10), "the output is 10 numbers a sample, some negative, as class scores are"),
        (scores_of(10, 3.0, SOFTMAX), "the output is probabilities of 10 classes a sample"),
        (
            scores_of(10, 3.0, node("LogSoftmax", ["s"], "y", axis=1)),
            "the output is probabilities of 10 classes a sample",
        ),
        (scores_of(40, 0.1, SOFTMAX), "the output is probabilities of 40 classes a sample"),
        (scores_of(2, 0.1), "the output is 2 numbers a sample, some negative"),
        (scores_of(40), "the output is scores of 40 classes a sample (softmax 8"),
        (
            scores_of(40, 0.02, node("Sigmoid", ["s"], "y")),
            "the output is scores of 40 classes a sample (the sigmoid at its end)",
        ),
        (scores_of(40, 0.4), "(a linear layer that widens at its end)"),
    ],
)
def test_class_scores_with_labels_and_without(model: onnx.ModelProto, line: str) -> None:
    chosen = default_of(model, FEATURES)
    assert (chosen.name, chosen.max_drop) == ("agreement", LIMITS["agreement"])
    assert line in chosen.because
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    scores = session.run({"x": FEATURES})["y"]
    chosen = default_of(model, FEATURES, scores.argmax(1))
    assert (chosen.name, chosen.max_drop) == ("top1", LIMITS["top1"])
    assert chosen.because == f"there are labels, and {scores.shape[1]} classes"


def test_in_doubt_arg_max_counts_and_the_line_names_cosine() -> None:
    narrowing = make_model(
        [node("MatMul", ["x", "w"], "y")], {"x": ["n", 64]}, ["y"], {"w": normal(64, 32, scale=0.2)}
    )
    chosen = default_of(narrowing, normal(ROWS, 64))
    assert chosen.name == "agreement"
    assert "if it is an embedding, name cosine" in chosen.because


def test_labels_that_are_right_by_chance() -> None:
    model = scores_of(10)
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    wrong = (session.run({"x": FEATURES})["y"].argmax(1) + 1) % 10
    chosen = default_of(model, FEATURES, wrong)
    assert chosen.name == "agreement"
    assert chosen.because.endswith("the original gets no more of them right than chance would")


def test_one_class_or_synthetic_inputs_say_little_of_arg_max() -> None:
    chosen = default_of(scores_of(10, 0.1, SOFTMAX), FEATURES[:1].repeat(ROWS, axis=0))
    assert chosen.name == "rel-error"
    assert "all samples are of one class" in chosen.because
    chosen = default_of(scores_of(10), FEATURES, synthetic=True)
    assert chosen.name == "rel-error"
    assert "inputs are synthetic" in chosen.because


def test_a_language_model_is_judged_by_the_words_it_gives() -> None:
    model = sentences(node("MatMul", ["h", "vocabulary"], "y"))
    chosen = default_of(model, WORDS)
    assert chosen.name == "agreement"
    assert "scores of 30 classes a position (softmax" in chosen.because
    # The same without a word that stands out: as many numbers, but not known to be classes.
    chosen = default_of(sentences(node("MatMul", ["h", "narrow"], "y")), WORDS)
    assert chosen.name == "rel-error"
    assert "20 numbers a position (softmax 1% above chance)" in chosen.because


def test_tokens_of_few_classes() -> None:
    tagger = sentences(
        node("MatMul", ["h", "vocabulary"], "v"),
        node("Slice", ["v", "zeros", "sevens", "third"], "y"),
    )
    tagger.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array([v]), n)
        for n, v in (("zeros", 0), ("sevens", 7), ("third", 2))
    )
    chosen = default_of(tagger, WORDS)
    assert chosen.name == "agreement"
    assert "7 numbers a position, some negative" in chosen.because


CONV = {"k": normal(3, 1, 3, 3), "back": normal(3, 1, 2, 2)}


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (  # an autoencoder of convolutions
            make_model(
                [
                    node("Conv", ["x", "k"], "h", pads=[1, 1, 1, 1], strides=[2, 2]),
                    node("ConvTranspose", ["h", "back"], "z", strides=[2, 2]),
                    node("Sigmoid", ["z"], "y"),
                ],
                {"x": ["n", 1, 8, 8]},
                ["y"],
                CONV,
            ),
            "the output has 4 axes, as images and maps have",
        ),
        (  # one of linear layers
            make_model(
                [
                    node("Flatten", ["x"], "f"),
                    node("MatMul", ["f", "w"], "h"),
                    node("MatMul", ["h", "v"], "z"),
                    node("Sigmoid", ["z"], "y"),
                ],
                {"x": ["n", 1, 8, 8]},
                ["y"],
                {"w": normal(64, 20), "v": normal(20, 64)},
            ),
            "the output is as large as an input (a reconstruction, say)",
        ),
        (  # segmentation
            make_model(
                [
                    node("Conv", ["x", "k"], "z", pads=[1, 1, 1, 1]),
                    node("Softmax", ["z"], "y", axis=1),
                ],
                {"x": ["n", 1, 8, 8]},
                ["y"],
                CONV,
            ),
            "the output has 4 axes, as images and maps have",
        ),
    ],
)
def test_images_are_judged_by_relative_error(model: onnx.ModelProto, line: str) -> None:
    chosen = default_of(model, IMAGES)
    assert chosen == MetricChoice("rel-error", LIMITS["rel-error"], line)


def test_a_map_of_labels_is_judged_by_agreement() -> None:
    nodes = [
        node("Conv", ["x", "k"], "z", pads=[1, 1, 1, 1]),
        node("ArgMax", ["z"], "y", axis=1),
    ]
    model = make_model(nodes, {"x": ["n", 1, 8, 8]}, ["y"], CONV)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    chosen = default_of(model, IMAGES)
    because = "the output holds labels: integers or truth values"
    assert (chosen.name, chosen.because) == ("agreement", because)


def answers_of(op: str = "ArgMax", kind: int = onnx.TensorProto.INT64) -> onnx.ModelProto:
    """A classifier that gives the class, or whether a score is above a threshold."""
    threshold = node("ReduceMax", ["s"], "m", axes=[1], keepdims=0)
    ends = {
        "ArgMax": [node("ArgMax", ["s"], "y", axis=1, keepdims=0)],
        "Greater": [threshold, node("Greater", ["m", "t"], "y")],
        "Cast": [node("Cast", ["s"], "y", to=kind)],
    }
    model = scores_of(5, 3.0, *ends[op])
    if op == "Greater":
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.full((), 2, np.float32), "t")
        )
    model.graph.output[0].type.tensor_type.elem_type = (
        onnx.TensorProto.BOOL if op == "Greater" else kind
    )
    return model


def test_labels_that_a_model_gives() -> None:
    for op in ("ArgMax", "Greater"):
        chosen = default_of(answers_of(op), FEATURES)
        assert (chosen.name, chosen.max_drop) == ("agreement", LIMITS["agreement"])
        assert chosen.because == "the output is a label: integers or truth values"
    session = Session(answers_of().SerializeToString(), ONE_CPU_THREAD)
    right = session.run({"x": FEATURES})["y"]
    chosen = default_of(answers_of(), FEATURES, right)
    assert (chosen.name, chosen.because) == ("top1", "there are labels, and the output is one")
    chosen = default_of(answers_of(), FEATURES, np.roll(right, 1) + 9)
    assert chosen.name == "agreement"
    assert "they have nothing to do with those that the model gives" in chosen.because
    chosen = default_of(answers_of("Cast", onnx.TensorProto.UINT8), np.abs(FEATURES))
    assert (chosen.name, chosen.because) == ("rel-error", "the output is of small integers")


@pytest.mark.parametrize("labels", [None, np.arange(ROWS) % 2])
@pytest.mark.parametrize(
    ("model", "line"),
    [
        (scores_of(1), "the output is one number a sample"),
        (scores_of(1, 1.0, node("Squeeze", ["s"], "y")), "the output is one number a sample"),
        (scores_of(3, 0.1, bias=4.0), "the output is 3 numbers a sample, none negative, so no"),
    ],
)
def test_regressions_are_judged_by_relative_error(
    model: onnx.ModelProto, line: str, labels: Array | None
) -> None:
    chosen = default_of(model, FEATURES, labels)
    assert (chosen.name, chosen.max_drop) == ("rel-error", LIMITS["rel-error"])
    assert chosen.because.startswith(line)
    assert ("the labels aren't used" in chosen.because) == (labels is not None)


def test_a_detector_of_boxes_and_scores() -> None:
    nodes = [
        node("Flatten", ["x"], "f"),
        node("MatMul", ["f", "w"], "z"),
        node("Reshape", ["z", "rows"], "all"),
        node("Slice", ["all", "four", "five", "one"], "score"),
        node("Squeeze", ["score", "one"], "flat"),
        node("Greater", ["flat", "zero"], "taken"),
        node("Slice", ["all", "none", "four", "one"], "every"),
        node("Compress", ["every", "taken"], "boxes", axis=0),
        node("Compress", ["flat", "taken"], "scores", axis=0),
    ]
    numbers = (("none", 0), ("one", 1), ("four", 4), ("five", 5))
    weights = {n: np.array([v]) for n, v in numbers}
    weights |= {"w": normal(64, 50), "rows": np.array([-1, 5]), "zero": np.zeros((), np.float32)}
    model = make_model(nodes, {"x": ["n", 1, 8, 8]}, ["boxes", "scores"], weights)
    chosen = default_of(model, IMAGES)
    assert chosen.name == "rel-error"
    assert chosen.because == "2 outputs, of numbers: the worst counts"
    one = make_model(nodes, {"x": ["n", 1, 8, 8]}, ["boxes"], weights)
    assert default_of(one, IMAGES).because.startswith("the output's rows are no samples (but boxes")


def test_several_outputs_of_different_kinds() -> None:
    head = node("MatMul", ["y", "vocabulary"], "classes")
    chosen = default_of(sentences(*MASKED_MEAN, head, outputs=("y", "classes")), WORDS)
    assert chosen.name == "rel-error"
    assert chosen.because == "2 outputs, of embeddings and of class scores: the worst counts"


def test_labels_judge_the_class_scores_of_a_model_with_more_outputs() -> None:
    head = node("MatMul", ["y", "vocabulary"], "classes")
    model = sentences(*MASKED_MEAN, head, outputs=("classes", "y"))
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    labels = session.run({"x": WORDS})["classes"].argmax(1)
    assert default_of(model, WORDS, labels).name == "top1"


def test_the_statistics_by_hand() -> None:
    y = normal(ROWS, 20).astype(np.float64) + 0.3
    profile = Profile(None)
    for part in np.split(y, [3, 30]):
        profile.add(part, len(part), None, [])
    top = softmax(y, axis=1).max(1).mean()
    assert profile.certainty == pytest.approx((top - 1 / 20) / (1 - 1 / 20), rel=1e-9)
    units = y / np.linalg.norm(y, axis=1, keepdims=True)
    mean = units.mean(0) / np.linalg.norm(units.mean(0))
    assert profile.apart == pytest.approx(1 - np.mean(units @ mean), rel=1e-9)
    assert profile.of_classes == len(set(y.argmax(1)))


@pytest.mark.parametrize(("right", "sure"), [(22, False), (23, True)])
def test_how_many_right_labels_are_no_chance(right: int, sure: bool) -> None:
    """Guesses and labels of two classes, half of each: 12 of 24 are met by chance, 3·√12 more
    are significant; columns of which there are more make no difference."""
    guesses = np.arange(24) % 2
    labels = np.where(np.arange(24) < right, guesses, 1 - guesses)
    profile = Profile(labels)
    profile.add(np.eye(20)[guesses], 24, np.arange(24), [])
    assert not profile.right_by_chance
    expected = sum(np.mean(guesses == c) * np.mean(labels == c) for c in (0, 1)) * 24
    assert (right - expected > 3 * np.sqrt(expected)) == sure
    assert profile.right_for_sure == sure


def test_limits_where_none_is_named() -> None:
    """The numbers that help, the API and REFERENCE.md name."""
    expected = {"top1": 0.01, "agreement": 0.01, "cosine": 0.02, "rel-error": 0.05, "my:own": 0.01}
    assert {name: default_limit(name) for name in expected} == expected
    assert (layer_limit(None), layer_limit(0.3)) == (0.01, 0.3)


@pytest.mark.parametrize(("right", "by_chance"), [(2, True), (3, False)])
def test_as_many_right_labels_as_a_guess_among_all_classes_gets(
    right: int, by_chance: bool
) -> None:
    guesses = np.arange(20) % 10
    profile = Profile(np.where(np.arange(20) < right, guesses, (guesses + 1) % 10))
    profile.add(np.eye(10)[guesses], 20, np.arange(20), [])
    assert profile.right_by_chance == by_chance
