"""What every test gets: benchmarks that take a blink, since no test asserts a time."""

import pytest


@pytest.fixture(autouse=True)
def _short_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.verify.latency.SECONDS", 0.05)
    monkeypatch.setattr("onnxlr.verify.latency.FEWEST", 9)
    monkeypatch.setattr("onnxlr.verify.layer_latency.SECONDS", 0.02)
    # Fewer candidates to weigh: what is tested is how they are chosen.
    monkeypatch.setattr("onnxlr.plan.tradeoff.RANKS", 4)
    monkeypatch.setattr("onnxlr.plan.choose._BOLDER", 1)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test finds what another left behind."""
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of our own making need no process of their own first; where it matters, it is on."""
    monkeypatch.setenv("ONNXLR_TRIAL", "off")
