"""What every test gets: benchmarks that take a blink, since no test asserts a time."""

import pytest


@pytest.fixture(autouse=True)
def _short_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.latency.SECONDS", 0.05)
    monkeypatch.setattr("onnxlr.latency.FEWEST", 9)
    monkeypatch.setattr("onnxlr.layer_timing.SECONDS", 0.02)
    # Fewer candidates to weigh: what is tested is how they are chosen.
    monkeypatch.setattr("onnxlr.weighing._RANKS", 4)
    monkeypatch.setattr("onnxlr.optimizer._BOLDER", 1)
