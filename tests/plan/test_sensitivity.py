"""From a few probes of a layer to what any error of it does."""

import math
from typing import Any

import pytest

from onnxlr.plan.sensitivity import Sensitivity


def row(error: float, harm: float | None, divergence: float | None = None) -> dict[str, Any]:
    return {"error": error, "harm": harm, "divergence": divergence}


def test_goes_through_what_was_measured() -> None:
    rows = [row(0.4, 0.1, 0.02), row(0.1, 0.03, 0.001)]
    for by_classes, losses in ((False, (0.0009, 0.01)), (True, (0.001, 0.02))):
        sensitivity = Sensitivity.from_probes(rows, by_classes=by_classes)
        for error, harm, loss in zip((0.1, 0.4), (0.03, 0.1), losses, strict=True):
            assert sensitivity.harm(error) == pytest.approx(harm)
            assert sensitivity.loss(error) == pytest.approx(loss)
        # Half way on a logarithmic scale the ratios are half way too.
        assert sensitivity.harm(0.2) == pytest.approx(0.2 * math.sqrt(0.3 * 0.25))
        # Beyond, harm goes with the error, and loss with its square.
        assert sensitivity.harm(0.8) == pytest.approx(0.2)
        assert sensitivity.loss(0.05) == pytest.approx(losses[0] / 4)


def test_is_infinite_where_outputs_were() -> None:
    sensitivity = Sensitivity.from_probes([row(0.1, 0.2), row(0.6, None)], by_classes=False)
    assert sensitivity.loss(0.3) == pytest.approx(0.36)
    assert sensitivity.loss(0.6) == math.inf
    assert Sensitivity.from_probes([row(0.1, None)], by_classes=True).loss(0.01) == math.inf


def test_of_nothing_measured_is_the_error_itself() -> None:
    assert Sensitivity().harm(0.3) == pytest.approx(0.3)
    assert Sensitivity().loss(0.3) == pytest.approx(0.09)


def test_a_layer_that_does_no_harm_costs_nothing() -> None:
    sensitivity = Sensitivity.from_probes([row(0.25, 0.0, 0.0)], by_classes=True)
    assert sensitivity.loss(0.5) < 1e-200
