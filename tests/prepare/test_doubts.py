"""Samples that look wrong are told of, and those that look right are not."""

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import onnxlr
from onnxlr.model.load import load
from onnxlr.prepare.doubts import doubts_about
from onnxlr.prepare.inputs import input_specs
from onnxlr.prepare.samples import load_samples
from onnxlr.progress import Silent
from onnxlr.system.in_memory import InMemory
from onnxlr.verify.profile import Profile
from tests.support.builders import make_model, node

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
BYTES = RNG.integers(0, 256, (40, 3, 8, 8)).astype(np.float32)


def conv(*before: Any, constant: float | None = None) -> onnx.ModelProto:
    weights: dict[str, NDArray[Any]] = {"w": KERNEL}
    if constant is not None:
        weights["c"] = np.array(constant, np.float32)
    last = before[-1].output[0] if before else "x"
    return make_model(
        [*before, node("Conv", [last, "w"], "y")], {"x": ["n", 3, 8, 8]}, ["y"], weights
    )


def doubts(model: onnx.ModelProto, samples: NDArray[Any]) -> tuple[str, ...]:
    source = load(model)
    specs = input_specs(source.model)
    return doubts_about(load_samples(InMemory(([samples],)), specs, None), source.model)


@pytest.mark.parametrize(
    ("model", "samples", "said"),
    [
        (conv(), BYTES, "whole numbers up to 255, and Conv takes them as they are"),
        (
            conv(node("Identity", ["x"], "h")),
            BYTES,
            "whole numbers up to 255, and Conv takes them as they are",
        ),
        (conv(), BYTES / 255, None),
        (conv(), BYTES - 127.5, None),
        (conv(node("Div", ["x", "c"], "h"), constant=255), BYTES, None),
        (conv(node("Sub", ["x", "c"], "h"), constant=128), BYTES, None),
        (
            conv(node("Div", ["x", "c"], "h"), constant=255),
            BYTES / 255,
            "at most 1, and the model divides them by 255 itself",
        ),
        (
            conv(node("Mul", ["x", "c"], "h"), constant=1 / 255),
            BYTES / 255,
            "at most 1, and the model divides them by 255 itself",
        ),
        (conv(node("Mul", ["x", "c"], "h"), constant=2), BYTES / 255, None),
        (conv(), BYTES[:12] / 255, "12 samples are very few"),
        (conv(), BYTES[:1] / 255, "1 sample is very few"),
        (conv(), np.concatenate([BYTES, BYTES[:3]]) / 255, "3 of 43 samples repeat others"),
    ],
)
def test_what_looks_wrong_is_said(
    model: onnx.ModelProto, samples: NDArray[Any], said: str | None
) -> None:
    found = doubts(model, samples.astype(np.float32))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


@pytest.mark.parametrize(
    ("right", "count", "classes", "doubtful"),
    [
        (10, 100, 10, True),  # chance
        (16, 100, 10, True),  # above chance, and still below three times of it
        (29, 100, 10, True),
        (31, 100, 10, False),
        (90, 100, 10, False),
        (50, 100, 2, True),
        (57, 100, 2, True),  # 9.7% of coins do as well
        (59, 100, 2, False),  # 4.4% of them
    ],
)
def test_labels_that_seem_to_belong_to_others(
    right: int, count: int, classes: int, doubtful: bool
) -> None:
    labels = np.arange(count) % classes
    profile = Profile(labels)
    guesses = np.where(np.arange(count) < right, labels, (labels + 1) % classes)
    profile.add(np.eye(classes)[guesses], count, np.arange(count), ())
    assert (profile.doubt is not None) == doubtful
    assert not doubtful or f"{right}% of {count} samples right" in (profile.doubt or "")


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)


def test_it_is_told_before_the_work_and_in_the_report() -> None:
    weight = RNG.standard_normal((30, 10)).astype(np.float32)
    model = make_model([node("MatMul", ["x", "w"], "y")], {"x": ["n", 30]}, ["y"], {"w": weight})
    data = {"x": RNG.standard_normal((200, 30)).astype(np.float32), "z": np.arange(200) % 10}
    told = Lines()
    result = onnxlr.optimize(
        model, data=data, labels="z", metric="top1", rank=4, measure=False, progress=told
    )
    warnings = [line for line in told.lines if line.startswith("warning: the original gets")]
    assert len(warnings) == 1
    assert warnings[0] in result.report.notes
    assert result.report["notes"] == list(result.report.notes)


def test_samples_that_hold_no_numbers_are_counted() -> None:
    samples = BYTES - 127.5
    samples[3, 1, 2, 2] = samples[5] = np.nan
    samples[7, 0, 0, 0] = np.inf  # a mask may be infinite
    (told,) = doubts(conv(), samples)
    assert told.startswith("2 of 40 samples hold NaN")


@pytest.mark.parametrize(("count", "told"), [(1, False), (2, True), (6, True)])
def test_of_a_single_label_nothing_is_told(count: int, told: bool) -> None:
    """Were it right, that might be luck as well."""
    for right in (count, 0):
        labels = np.full(count, 1 if right else 2)
        profile = Profile(labels)
        profile.add(np.eye(5)[np.ones(count, int)], count, np.arange(count), [])
        assert (profile.doubt is not None) == (told and not right)
