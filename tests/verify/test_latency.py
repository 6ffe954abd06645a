"""The benchmark's arithmetic and what it decides, on machines whose clocks are made for it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

import onnxlr
from onnxlr.limits import Limits
from onnxlr.system.session import ONE_CPU_THREAD, Machine, Session
from onnxlr.verify import latency, rounds
from onnxlr.verify.latency import (
    Comparison,
    decides,
    decides_gain,
    interleave,
    median_interval,
    runs_in_caller,
    time_session,
)
from onnxlr.verify.rounds import BUSY, best_of_groups
from tests.support.builders import linear
from tests.support.clocks import FakeMachine

TWICE_THE_CORES = 2.0  # other processes for each core


def timed(
    machine: FakeMachine,
    a: float,
    b: float,
    *,
    seconds: float = 9.0,
    by_processor: bool = True,
    **more: Any,
) -> Comparison:
    """Two functions of these costs in milliseconds, timed in turn."""
    runs = (lambda: machine.work("a", a)), (lambda: machine.work("b", b))
    with machine.clocks():
        return interleave(*runs, decides(0.02), seconds, by_processor=by_processor, **more)


@pytest.mark.parametrize("by_processor", [True, False])
@pytest.mark.parametrize("noise", [0.02, 0.1])
@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [(10.0, 5.0, "faster"), (0.05, 0.1, "slower"), (0.8, 0.8, "within noise")],
)
def test_verdicts(a: float, b: float, verdict: str, noise: float, by_processor: bool) -> None:
    result = timed(FakeMachine(noise=noise), a, b, by_processor=by_processor)
    assert (result.verdict, result.settled) == (verdict, True)
    # The best of blocks of one run is nearer to the least than that of blocks of several.
    assert result.speedup == pytest.approx(a / b, rel=0.01 + 0.2 * noise)
    assert result.low <= result.speedup <= result.high
    assert result.a.min_ms <= result.a.median_ms <= result.a.p90_ms
    assert result.busy == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (1.0, 0.5, "faster"),
        (0.9, 0.8, "faster"),
        (30.0, 20.0, "faster"),
        (0.5, 0.6, "slower"),
        (2.0, 2.0, "within noise"),
    ],
)
def test_the_decisions_under_load_are_those_of_a_quiet_machine(
    a: float, b: float, verdict: str, seed: int
) -> None:
    quiet, loaded = (timed(FakeMachine(n, seed=seed), a, b) for n in (0, TWICE_THE_CORES))
    assert quiet.verdict == loaded.verdict == verdict
    assert loaded.speedup == pytest.approx(a / b, rel=0.03)
    assert loaded.a.median_ms == pytest.approx(quiet.a.median_ms, rel=0.1)
    assert quiet.busy < BUSY < loaded.busy
    assert loaded.busy == pytest.approx(2 / 3, abs=0.15)


@pytest.mark.parametrize("seed", range(10))
def test_short_blocks_survive_where_only_the_clock_on_the_wall_counts(seed: int) -> None:
    machine = FakeMachine(TWICE_THE_CORES, seed=seed)
    result = timed(machine, 0.1, 0.05, by_processor=False)
    assert result.verdict == "faster"
    assert result.speedup == pytest.approx(2.0, rel=0.05)
    assert result.busy > BUSY


@pytest.mark.parametrize("seed", range(5))
def test_what_lasts_longer_is_not_disturbed_more_often(seed: int) -> None:
    """Were its blocks longer than those of the other, the first would seem to take 30 ms."""
    machine = FakeMachine(TWICE_THE_CORES, seed=seed)
    result = timed(machine, 10.0, 2.0, by_processor=False)
    assert result.speedup == pytest.approx(5.0, rel=0.3)
    assert result.busy > BUSY


@pytest.mark.parametrize("seed", range(10))
def test_a_neighbour_that_stays_for_a_while_does_not_count(seed: int) -> None:
    """Beside it, the ratio is 2.8: the first takes its memory more."""
    machine = FakeMachine(seed=seed)
    machine.neighbour = {"a": 1.7, "b": 1.2}
    result = timed(machine, 0.1, 0.05, least_seconds=0.3)
    assert result.speedup == pytest.approx(2.0, rel=0.05)
    assert result.a.median_ms == pytest.approx(0.1, rel=0.08)


def test_what_cannot_be_decided_says_so() -> None:
    machine = FakeMachine(others=20, noise=1.0)
    result = timed(machine, 8.0, 7.9, seconds=3.0, by_processor=False)
    assert result.verdict == "within noise"
    assert not result.settled
    assert result.low < 1.0 < result.high
    assert "the machine was busy" in result.doubt
    assert "no other process" in timed(FakeMachine(noise=3.0), 8.0, 7.9, seconds=0.1).doubt
    assert timed(FakeMachine(), 8.0, 4.0).doubt == ""


def test_it_ends_as_soon_as_it_is_decided_and_in_any_case() -> None:
    clear, close = FakeMachine(noise=0.01), FakeMachine(noise=1.0)
    assert timed(clear, 2.0, 1.0).rounds == 36
    assert clear.wall < 0.2
    assert not timed(close, 2.0, 1.98, seconds=0.3).settled
    assert 0.3 < close.wall < 0.4
    slow = FakeMachine(noise=1.0)
    assert timed(slow, 500.0, 495.0, seconds=0.3, rows=18).rounds == 18
    sure = FakeMachine(noise=4.0)
    result = timed(sure, 20.0, 4.0, seconds=30.0)
    assert (result.verdict, result.settled) == ("faster", False)
    assert 10.0 < sure.wall < 30.0
    kept_on = FakeMachine()
    assert timed(kept_on, 2.0, 1.0, seconds=3.0, least_seconds=3.0).settled
    assert 3.0 < kept_on.wall < 3.1


class Coin:
    """Two functions that take equally long: who goes on until it looks otherwise?"""

    def __init__(self, seed: int) -> None:
        self.times = np.random.default_rng(seed).exponential(size=(2304, 2))
        self.rows = 0

    def add_row(self) -> None:
        self.rows += 1

    @property
    def best(self) -> NDArray[np.float64]:
        return best_of_groups(self.times[: self.rows])


def test_looking_until_it_says_something_is_not_rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a level of 5% for each look, one in four of these would be faster or slower."""
    monkeypatch.setattr("onnxlr.verify.latency.time.perf_counter", lambda: 0.0)
    fooled, runs = 0, 600

    def says_something(best: NDArray[np.float64], _: float) -> bool:
        low, high = median_interval(best[:, 0] / best[:, 1], latency.LEVEL)
        return low > 1 or high < 1

    for seed in range(runs):
        coin: Any = Coin(seed)
        latency._repeat(coin, says_something, 0.0, 2304, 0.0)
        fooled += coin.rows < 2304
    assert 0.005 < fooled / runs < 0.05


@pytest.mark.parametrize(
    ("low", "high", "settled", "gain"),
    [
        (1.50, 1.54, True, True),  # faster, and known to 2%
        (1.50, 1.60, False, False),
        (0.20, 0.98, True, True),  # slower, by whatever
        (0.20, 1.00, False, True),  # no gain; perhaps a loss
        (0.992, 1.009, True, True),  # equal
        (1.006, 1.014, True, True),  # on the border
        (1.001, 1.016, False, True),
        (0.98, 1.03, False, False),
    ],
)
def test_what_an_interval_decides(low: float, high: float, settled: bool, gain: bool) -> None:
    assert (decides(0.02)(low, high), decides_gain(0.02)(low, high)) == (settled, gain)


@pytest.mark.parametrize("by_processor", [True, False])
def test_milliseconds_are_those_of_one_run(by_processor: bool) -> None:
    machine = FakeMachine(noise=0.0)
    machine.waves = 0.0
    result = timed(machine, 0.07, 2.0, by_processor=by_processor)
    assert (result.a.min_ms, result.a.median_ms, result.a.p90_ms) == pytest.approx((0.07,) * 3)
    assert (result.b.min_ms, result.b.median_ms, result.b.p90_ms) == pytest.approx((2.0,) * 3)
    assert result.speedup == pytest.approx(0.035)


@pytest.mark.parametrize("seed", range(20))
def test_milliseconds_and_ratio_agree(seed: int) -> None:
    machine = FakeMachine(others=1.0, noise=2.0, seed=seed)
    result = timed(machine, 0.7, 0.5, seconds=0.2)
    assert result.a.median_ms / result.b.median_ms == pytest.approx(result.speedup, rel=1e-12)
    assert result.b.min_ms <= result.b.median_ms
    assert result.low <= result.speedup <= result.high


def test_order_alternates() -> None:
    machine = FakeMachine()
    timed(machine, 10.0, 10.0)
    assert "".join(machine.calls[14:]).startswith("abbaabba")


def test_fast_functions_are_timed_in_blocks() -> None:
    machine = FakeMachine()
    result = timed(machine, 0.01, 0.02)
    assert len(machine.calls) > 60 * result.rounds
    assert result.a.median_ms == pytest.approx(0.0105, rel=0.25)


@pytest.mark.parametrize("count", [9, 10, 20, 32, 87, 101, 400, 2304])
@pytest.mark.parametrize("level", [0.05, latency.LEVEL])
def test_the_interval_is_the_narrowest_that_covers_the_median(count: int, level: float) -> None:
    low, high = median_interval(np.random.default_rng(0).permutation(count).astype(float), level)
    assert low == count - 1 - high
    missed, narrower = (2 * binom.cdf(end, count, 0.5) for end in (low, low + 1))
    assert missed <= level < narrower


@pytest.mark.parametrize("count", [9, 20, 101, 400])
def test_the_interval_covers_the_median_as_often_as_it_says(count: int) -> None:
    rng = np.random.default_rng(count)
    runs = rng.lognormal(sigma=0.5, size=(2000, count))  # median 1
    covered = [low <= 1.0 <= high for low, high in map(median_interval, runs)]
    assert 0.94 <= np.mean(covered) <= 0.985


def test_one_model_is_timed_until_its_time_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(TWICE_THE_CORES)
    monkeypatch.setattr(Session, "bind", lambda *_: lambda: machine.work("a", 0.2))
    session = Session(linear(np.ones((8, 4), np.float32)).SerializeToString(), ONE_CPU_THREAD)
    assert runs_in_caller(ONE_CPU_THREAD) is rounds.has_fine_processor_clock()
    monkeypatch.setattr(latency, "has_fine_processor_clock", lambda: True)
    with machine.clocks():
        timing = time_session(session, {}, Limits())
        assert machine.wall < 1.0
        time_session(session, {}, Limits(timing_seconds=2.0, timing_seconds_least=2.0))
    assert machine.wall > 2.3
    assert timing.median_ms == pytest.approx(0.2, rel=0.2)
    assert timing.p90_ms > 1.5 * timing.median_ms  # on the wall, waits included


def test_only_a_session_that_runs_in_its_caller_is_timed_by_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for fine in (True, False):
        monkeypatch.setattr(latency, "has_fine_processor_clock", lambda fine=fine: fine)
        assert runs_in_caller(Machine()) is fine
        assert not runs_in_caller(Machine(threads=2))
        assert not runs_in_caller(Machine("cuda"))


@pytest.mark.parametrize(
    ("step", "fine"), [(3e-7, True), (1e-4, False), (1e-2, False), (0.0, False)]
)
def test_a_coarse_clock_is_not_trusted(
    step: float, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter(range(20_000))

    def coarse() -> float:
        now = 3e-7 * next(readings)
        return now // step * step if step else 0.0

    monkeypatch.setattr("onnxlr.verify.rounds.time.thread_time", coarse)
    assert rounds.has_fine_processor_clock.__wrapped__() is fine


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


def test_an_output_that_is_listed_twice_is_timed() -> None:
    model = linear(np.ones((6, 4), np.float32), rows="n")
    model.graph.output.append(model.graph.output[0])
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    feed = {"x": np.ones((2, 6), np.float32)}
    session.bind(feed)()
    result = onnxlr.optimize(model, rank="exact", data={"x": np.ones((40, 6), np.float32)})
    assert len(result.model.graph.output) == 2
