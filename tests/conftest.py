"""What every test gets: benchmarks that take a blink, since no test asserts a time."""

import pytest

from onnxlr.limits import Limits

# Fewer candidates to weigh, too: what is tested is how they are chosen.
SHORT = Limits(timing_seconds=0.05, timing_rounds=9, layer_seconds=0.02, ranks=4, bolder_levels=1)


@pytest.fixture(autouse=True)
def _short_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.api.LIMITS", SHORT)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test finds what another left behind."""
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of our own making need no process of their own first; where it matters, it is on."""
    monkeypatch.setenv("ONNXLR_TRIAL", "off")
