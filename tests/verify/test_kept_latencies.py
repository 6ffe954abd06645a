"""What later runs find in the table that they share: nothing noisy, nothing that has changed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxlr
from onnxlr.errors import CrashError, UsageError
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import find_pass
from onnxlr.model.load import load
from onnxlr.options import Options, command_of
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.system.cache import Cache
from onnxlr.system.session import Machine
from onnxlr.verify import layer_latency
from onnxlr.verify.latency import Comparison
from onnxlr.verify.latency_table import LatencyTable, machine_table, named_table
from onnxlr.verify.layer_latency import CRASHED, LayerTime
from onnxlr.verify.rounds import BUSY
from onnxlr.verify.timing_log import TimingLog
from tests.support.builders import linear, low_rank, make_model, node
from tests.support.clocks import comparison

HERE = Machine()


class Clock:
    """Stands in for measuring: a layer takes 1 ms, a rank r of it a share of r / 32."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.slower = 1.0  # replacements, by this factor
        self.speed = 1.0  # of the machine
        self.settled, self.busy = True, 0.0

    def __call__(self, _m: Any, layer: Layer, _u: Any, choice: Choice, *_: Any) -> LayerTime:
        self.asked.append(f"{layer.name} {choice.rank[0]}")
        before = 1.0 / self.speed
        after = before * self.slower * choice.rank[0] / 32
        return LayerTime(before, after, 1.01 * after, self.settled, self.busy)

    def take(self) -> list[str]:
        """What was asked for since the last time."""
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(layer_latency, "measure", made)
    return made


@pytest.fixture
def prepared() -> Prepared:
    """Five layers of different shapes."""
    rng = np.random.default_rng(0)
    sizes = (32, 40, 48, 56, 64, 72)
    weights = {f"w{i}": rng.standard_normal(sizes[i : i + 2]).astype(np.float32) for i in range(5)}
    nodes = [node("MatMul", [f"x{i}", f"w{i}"], f"x{i + 1}", f"fc{i}") for i in range(5)]
    return prepare(load(make_model(nodes, {"x0": (1, 32)}, ["x5"], weights)), feed=None)


def ask(table: LatencyTable, prepared: Prepared, *ranks: int) -> list[float]:
    """Shares of these ranks, layer by layer, as a run asks for them; the table is saved."""
    shares = []
    for layer in prepared.layers:
        for rank in ranks:
            time = table.time(prepared.model, layer, Choice(find_pass("svd"), (rank,)))
            assert time is not None
            shares.append(time.share)
        table.save()
    return shares


def names(prepared: Prepared, *ranks: int) -> list[str]:
    return [f"{layer.name} {rank}" for layer in prepared.layers for rank in ranks]


@pytest.mark.parametrize(
    ("settled", "busy", "kept"),
    [(True, 0.0, True), (True, BUSY, True), (False, 0.0, False), (True, 0.11, False)],
)
def test_only_what_settled_on_a_quiet_machine_is_kept(
    settled: bool, busy: float, kept: bool, clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    clock.settled, clock.busy = settled, busy
    table = machine_table(HERE, cache)
    shares = ask(table, prepared, 8)
    assert ask(table, prepared, 8) == shares  # measured once by this run, in any case
    assert clock.take() == names(prepared, 8)
    assert table.doubtful == (0 if kept else 5)
    clock.settled, clock.busy = True, 0.0
    ask(machine_table(HERE, cache), prepared, 8)
    assert len(clock.take()) == (2 if kept else 5)  # two probes, or all of them anew


@pytest.mark.parametrize(("busy", "kept"), [(0.9, False), (0.2, True)])
def test_among_timings_of_a_crowded_machine_none_is_kept(
    busy: float, kept: bool, clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    """One that by chance had the processor for itself shared the caches all the same."""
    cache = Cache(tmp_path)
    table = machine_table(HERE, cache)
    clock.busy = busy
    ask(table, prepared, 8)
    clock.busy = 0.0
    ask(table, prepared, 16)
    assert table.doubtful == (5 if kept else 10)
    clock.take()
    ask(machine_table(HERE, cache), prepared, 16)
    assert len(clock.take()) == (2 if kept else 5)  # two probes, or all of them anew


def test_a_file_that_was_named_says_what_its_run_used(
    clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    path = tmp_path / "t.json"
    clock.settled, clock.busy = False, 0.9
    shares = ask(named_table(HERE, path), prepared, 8, 16)
    clock.take()
    clock.slower = 3.0
    assert ask(named_table(HERE, path), prepared, 8, 16) == shares
    assert clock.take() == []  # not probed either


def test_two_layers_are_probed_and_what_agrees_is_used(
    clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    shares = ask(machine_table(HERE, cache), prepared, 8, 16)
    clock.take()
    clock.slower, clock.speed = 1.18, 2.9  # within what neighbours and clock rates change
    table = machine_table(HERE, cache)
    assert ask(table, prepared, 8, 16) == shares
    assert clock.take() == names(prepared, 8)[:2]
    assert table.stale == ""


@pytest.mark.parametrize(
    ("slower", "speed"), [(1.25, 1.0), (0.8, 1.0), (5.0, 1.0), (1.0, 3.1), (1.0, 0.32)]
)
def test_what_a_probe_contradicts_is_measured_anew(
    slower: float, speed: float, clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    shares = ask(machine_table(HERE, cache), prepared, 8, 16)
    clock.take()
    clock.slower, clock.speed = slower, speed
    table = machine_table(HERE, cache)
    fresh = ask(table, prepared, 8, 16)
    assert fresh == pytest.approx([slower * share for share in shares], rel=1e-4)
    assert clock.take() == names(prepared, 8, 16)
    assert "no longer hold" in table.stale
    assert prepared.layers[0].name in table.stale
    after = machine_table(HERE, cache)
    assert ask(after, prepared, 8, 16) == fresh
    assert after.stale == ""
    assert len(clock.take()) == 2


def test_a_later_probe_may_be_the_one_that_contradicts(
    clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    ask(machine_table(HERE, cache), prepared, 8)
    clock.take()
    table = machine_table(HERE, cache)
    first, second, *rest = prepared.layers
    choice = Choice(find_pass("svd"), (8,))
    kept = table.time(prepared.model, first, choice)
    clock.slower = 2.0
    for layer in (second, *rest):
        time = table.time(prepared.model, layer, choice)
        assert time is not None
        assert time.share == pytest.approx(0.5)
    assert table.time(prepared.model, first, choice) != kept
    assert len(clock.take()) == 1 + len(prepared.layers)


def test_how_much_slower_something_is_contradicts_nothing(
    clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    clock.slower = 4.0
    ask(machine_table(HERE, cache), prepared, 8, 16)
    clock.slower = 9.0
    table = machine_table(HERE, cache)
    ask(table, prepared, 8)
    assert table.stale == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_probe_on_a_busy_machine_contradicts_nothing(
    quiet: bool, clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    shares = ask(machine_table(HERE, cache), prepared, 8)
    clock.take()
    clock.slower, clock.settled, clock.busy = 3.0, not quiet, 0.0 if quiet else 0.5
    table = machine_table(HERE, cache)
    assert ask(table, prepared, 8) == shares
    assert len(clock.take()) == 4  # it tries more layers than two, not all
    assert table.log.waits == [clock.busy] * 4
    assert not table.log.undecided


@pytest.mark.parametrize("named", [True, False])
def test_remeasuring_replaces_what_is_there(
    named: bool, clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    def opened(**options: Any) -> LatencyTable:
        if named:
            return named_table(HERE, tmp_path / "t.json", **options)
        return machine_table(HERE, Cache(tmp_path), **options)

    shares = ask(opened(), prepared, 8, 16)
    clock.take()
    clock.slower = 1.1
    table = opened(remeasure=True)
    fresh = ask(table, prepared, 8)
    assert fresh == pytest.approx([1.1 * share for share in shares[::2]], rel=1e-4)
    assert clock.take() == names(prepared, 8)
    assert table.stale == ""
    assert ask(opened(), prepared, 8) == fresh
    clock.take()
    ask(opened(), prepared, 16)  # of the same layers, but not asked for then: gone
    assert clock.take() == names(prepared, 16)


def test_what_other_runs_add_meanwhile_stays(
    clock: Clock, prepared: Prepared, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    one, other = machine_table(HERE, cache), machine_table(HERE, cache)
    ask(one, prepared, 8)
    ask(other, prepared, 16)
    clock.take()
    ask(machine_table(HERE, cache), prepared, 8, 16)
    assert clock.take() == names(prepared, 8)[:2]


@pytest.mark.usefixtures("clock")
def test_the_table_of_another_machine_is_not_measured_anew(
    prepared: Prepared, tmp_path: Path
) -> None:
    path = tmp_path / "t.json"
    ask(named_table(HERE, path), prepared, 8)
    content = json.loads(path.read_text())
    content["machine"]["processor"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="of another machine"):
        named_table(HERE, path, remeasure=True)


@pytest.mark.parametrize(
    ("more", "flag"), [({"measure": False}, "no-measure"), ({"verify": "none"}, "verify none")]
)
def test_nothing_is_measured_anew_where_nothing_is_measured(more: Any, flag: str) -> None:
    with pytest.raises(UsageError, match=f"--remeasure times anew, --{flag} times nothing"):
        onnxlr.optimize(linear(np.ones((8, 8), np.float32)), remeasure=True, **more)


def test_the_command_line_that_asks_for_the_same_says_so() -> None:
    options = Options(remeasure=True)
    command = command_of(options, "a.onnx", "b.onnx")
    assert command == "onnxlr optimize a.onnx b.onnx --remeasure"


def line(times: Sequence[LayerTime], models: Sequence[Comparison]) -> str | None:
    log = TimingLog()
    for i, time in enumerate(times):
        log.add(f"layer{i}", time)
    return log.line(models)


def test_the_line_says_how_busy_it_was_and_what_stayed_open() -> None:
    sure = LayerTime(1.0, 0.5, 0.51)
    wide = LayerTime(1.0, 0.5, 0.9, settled=False, busy=0.7)  # faster all the same
    unsure = LayerTime(1.0, 0.9, 1.2, settled=False, busy=0.7)
    assert line([], []) is None
    assert line([sure] * 3, [comparison(2.0)]) is None
    told = line([wide], [comparison(2.0, busy=0.5)])
    assert told == (
        "the machine was busy, timings waited 60% of their time for other processes. It was "
        "decided all the same what is faster"
    )
    told = line([sure, unsure, *[wide] * 2], [comparison(1.1, noise=0.3, settled=False, busy=0.9)])
    assert told is not None
    assert "waited 60% of" in told
    assert "1 replacement of layer1 and a whole model (1.10×, 95% 0.77 to 1.43)" in told
    open_models = [comparison(ratio, noise=0.3, settled=False) for ratio in (1.1, 0.95, 1.2)]
    told = line([], [*open_models, comparison(2.0)])
    assert told is not None
    assert "not used: 3 whole models (0.95× to 1.20×). A" in told
    told = line([unsure] * 7, [])
    assert told is not None
    assert "7 replacements of layer0, layer1, layer2, layer3, layer4 and 2 more layers" in told
    quiet = LayerTime(1.0, 0.9, 1.2, settled=False)
    told = line([quiet], [])
    assert told is not None
    assert told.startswith("timings scattered, though no other process was in the way")


@pytest.mark.parametrize("named", [True, False])
def test_a_run_on_a_busy_machine_says_what_it_could_not_decide(
    named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = "onnxlr.verify.layer_latency.timed_apart"
    doubtful = comparison(1.2, noise=0.3, settled=False, busy=0.8)
    monkeypatch.setattr(timed, lambda *_, **__: doubtful)
    model = linear(low_rank(np.random.default_rng(0), 64, 64, 4), name="fc")
    options: dict[str, Any] = {"rank": "exact", "target": "latency", "max_drop": 1}
    options |= {"latency_table": tmp_path / "t.json"} if named else {}
    report = onnxlr.optimize(model, **options).report
    (decision,) = report.decisions
    assert decision.decision == "keep"
    assert "0.8333 ms, the original 1.000 ms: undecided, the machine was busy" in decision.reason
    (note,) = [note for note in report.notes if "busy" in note]
    assert "1 replacement of fc. A quieter" in note
    assert note.endswith("--remeasure takes them anew" if named else "not kept for later runs")
    if named:
        monkeypatch.setattr(timed, lambda *_, **__: comparison(2.0))
        monkeypatch.setattr("onnxlr.plan.evaluate.compare_sessions", lambda *_: comparison(2.0))
        assert onnxlr.optimize(model, **options).plan.replaced == ()
        anew = onnxlr.optimize(model, remeasure=True, **options)
        assert len(anew.plan.replaced) == 1
        assert not [note for note in anew.report.notes if "busy" in note]


def test_a_whole_model_that_stays_undecided_is_put_back_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doubtful = comparison(1.2, noise=0.3, settled=False, busy=0.8)
    monkeypatch.setattr("onnxlr.verify.layer_latency.timed_apart", lambda *_, **__: comparison(2.0))
    monkeypatch.setattr("onnxlr.plan.evaluate.compare_sessions", lambda *_: doubtful)
    model = linear(low_rank(np.random.default_rng(0), 64, 64, 4), name="fc")
    report = onnxlr.optimize(model, rank="exact", target="latency", max_drop=1).report
    (decision,) = report.decisions
    assert (
        "not measurably faster with it (1.20×, 95% 0.84 to 1.56), which decides" in decision.reason
    )
    assert any("a whole model (1.20×" in note for note in report.notes)
    assert report.to_dict()["speed"]["settled"] is False
    assert report.to_dict()["speed"]["busy"] == 0.8


def test_what_crashes_or_is_refused_is_no_noise(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> Comparison:
        raise CrashError("down")

    monkeypatch.setattr("onnxlr.verify.layer_latency.timed_apart", crash)
    table, layer = machine_table(HERE, Cache(tmp_path)), prepared.layers[0]
    assert table.time(prepared.model, layer, Choice(find_pass("svd"), (8,))) is CRASHED
    assert table.log.waits == []
    assert table.doubtful == 0
