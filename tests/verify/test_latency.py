"""The benchmark's arithmetic, on clocks made for it."""

import numpy as np
import pytest

from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.verify.latency import interleave, median_interval
from tests.support.builders import linear


class Clock:
    """A clock that two functions of set, noisy cost advance; load comes in slow waves."""

    def __init__(self, noise: float) -> None:
        self.now = 0.0
        self.noise = noise
        self.rng = np.random.default_rng(0)
        self.calls: list[str] = []

    def work(self, name: str, ms: float) -> None:
        wave = 1 + 0.5 * np.sin(self.now * 3)
        self.now += ms / 1e3 * wave * (1 + self.noise * self.rng.exponential())
        self.calls.append(name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(noise=0.2)
    monkeypatch.setattr("onnxlr.verify.latency.time.perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [(10.0, 5.0, "faster"), (5.0, 10.0, "slower"), (8.0, 8.0, "within noise")],
)
def test_verdicts(clock: Clock, a: float, b: float, verdict: str) -> None:
    result = interleave(lambda: clock.work("a", a), lambda: clock.work("b", b), 5.0)
    assert result.verdict == verdict
    assert result.low <= a / b <= result.high
    assert result.speedup == pytest.approx(a / b, rel=0.05)
    assert result.a.min_ms <= result.a.median_ms <= result.a.p90_ms


def test_a_gain_inside_the_noise_is_no_gain(clock: Clock) -> None:
    clock.noise = 1.0
    result = interleave(lambda: clock.work("a", 8.0), lambda: clock.work("b", 7.9), 0.3)
    assert result.verdict == "within noise"
    assert result.low < 1.0 < result.high


def test_order_alternates(clock: Clock) -> None:
    interleave(lambda: clock.work("a", 10.0), lambda: clock.work("b", 10.0), 1.0)
    timed = "".join(clock.calls[10:])
    assert timed.startswith("abbaabba")


def test_fast_functions_are_timed_in_blocks(clock: Clock) -> None:
    result = interleave(lambda: clock.work("a", 0.01), lambda: clock.work("b", 0.02), 0.2)
    assert len(clock.calls) > 100 * result.rounds
    assert result.a.median_ms == pytest.approx(0.01 * 1.1, rel=0.6)


@pytest.mark.parametrize("rounds", [9, 20, 101, 400])
def test_the_interval_covers_the_median_as_often_as_it_says(rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    runs = rng.lognormal(sigma=0.5, size=(2000, rounds))  # median 1
    covered = [low <= 1.0 <= high for low, high in map(median_interval, runs)]
    assert 0.93 <= np.mean(covered) <= 0.985


def test_what_is_timed_is_the_bare_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options make a bound run 20 µs slower: only the first run has them, to be stoppable."""
    model = linear(np.ones((8, 4), np.float32))
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    options_of_runs: list[object] = []
    unpatched = session.raw.run_with_iobinding

    def run(binding: object, options: object = None) -> None:
        options_of_runs.append(options)
        unpatched(binding, options)

    monkeypatch.setattr(session.raw, "run_with_iobinding", run)
    timed = session.bind({"x": np.ones((4, 8), np.float32)})
    assert [options is None for options in options_of_runs] == [False]
    timed()
    timed()
    assert options_of_runs[1:] == [None, None]
