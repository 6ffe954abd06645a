"""How many samples a correction needs: enough inputs for every layer, counted by hand."""

import numpy as np
import onnx

from onnxlr.calibrate.budget import samples_for_regression
from onnxlr.model.load import load
from onnxlr.prepare.prepared import prepare
from tests.support.builders import make_model, node

RNG = np.random.default_rng(0)


def net(batch: int, classes: int = 5) -> onnx.ModelProto:
    """A convolution with 8 × 8 outputs of 3·3·4 inputs each, and a dense layer of 128 inputs."""
    return make_model(
        [
            node("Conv", ["x", "kernel"], "c", "conv", pads=[1, 1, 1, 1]),
            node("Flatten", ["c"], "flat"),
            node("MatMul", ["flat", "dense"], "y", "dense"),
        ],
        {"x": (batch, 4, 8, 8)},
        ["y"],
        {
            "kernel": RNG.standard_normal((2, 4, 3, 3)).astype(np.float32),
            "dense": RNG.standard_normal((128, classes)).astype(np.float32),
        },
    )


def test_every_layer_has_so_many_inputs_for_each_element_of_one() -> None:
    for batch in (1, 4):
        prepared = prepare(load(net(batch)), feed=None)
        assert samples_for_regression(prepared, {"conv"}, 32) == 18  # 32 · 36 / 64
        assert samples_for_regression(prepared, {"dense"}, 32) == 32 * 128
        assert samples_for_regression(prepared, {"conv", "dense"}, 2) == 256  # 12% of the work
        assert samples_for_regression(prepared, set(), 2) == 0


def test_a_small_classifier_gets_by_with_fewer() -> None:
    prepared = prepare(load(net(1, classes=3)), feed=None)  # 8% of the work
    assert samples_for_regression(prepared, {"conv", "dense"}, 32) == 32 * 128 // 8
    assert samples_for_regression(prepared, {"conv", "dense"}, 1) == 16
