"""Tables of latencies: measured once, read by the next run, interpolated, never mixed up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.errors import UsageError
from onnxlr.layers.layer import Layer
from onnxlr.limits import Limits
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import find_pass
from onnxlr.model.load import load
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.system.session import Machine
from onnxlr.verify import layer_latency
from onnxlr.verify.latency_file import describe
from onnxlr.verify.latency_table import LatencyTable, named_table
from onnxlr.verify.layer_latency import LayerTime
from tests.support.builders import linear, make_model, node

HERE = Machine()


def two_convs() -> onnx.ModelProto:
    """The same convolution twice, and one of another stride."""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((32, 32, 3, 3)).astype(np.float32) for n in "abc"}
    pads = {"pads": [1, 1, 1, 1]}
    return make_model(
        [
            node("Conv", ["x", "a"], "h", "one", **pads),
            node("Conv", ["h", "b"], "i", "same", **pads),
            node("Conv", ["i", "c"], "y", "strided", strides=[2, 2], **pads),
        ],
        {"x": (1, 32, 8, 8)},
        ["y"],
        weights,
    )


@pytest.fixture
def prepared() -> Prepared:
    return prepare(load(two_convs()), feed=None)


class Clock:
    """Stands in for measuring: 1 ms for a layer, and for a rank r a share of r / 32."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        monkeypatch.setattr(layer_latency, "measure", self)

    def __call__(self, _m: Any, layer: Layer, _u: Any, choice: Choice, *_: Any) -> LayerTime:
        self.asked.append((layer.name, choice.rank))
        after = choice.rank[0] / 32
        return LayerTime(1.0, after, 1.1 * after)


def choices(*ranks: int) -> list[Choice]:
    return [Choice(find_pass("channel-svd"), (r,)) for r in ranks]


def test_a_signature_is_measured_once(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, table = Clock(monkeypatch), LatencyTable(HERE)
    one, same, strided = prepared.layers
    (choice,) = choices(8)
    times = [table.time(prepared.model, layer, choice) for layer in (one, same, strided)]
    assert times[0] == times[1] == LayerTime(1.0, 0.25, 0.275)
    assert [name for name, _ in clock.asked] == ["one", "strided"]


def test_a_table_is_read_again(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, path = Clock(monkeypatch), tmp_path / "t.json"
    table = named_table(HERE, path)
    first = table.time(prepared.model, prepared.layers[0], choices(8)[0])
    table.save()
    again = named_table(HERE, path)
    assert again.time(prepared.model, prepared.layers[0], choices(8)[0]) == first
    assert len(clock.asked) == 1
    content = json.loads(path.read_text())
    assert content["machine"] == describe(HERE)
    assert any("Conv 32x32x3x3" in key for key in content["times"])


def test_every_second_rank_is_interpolated(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, table = Clock(monkeypatch), LatencyTable(HERE)
    asked = choices(4, 8, 12, 16, 20)
    times = table.times(prepared.model, prepared.layers[0], asked)
    assert [rank for _, rank in clock.asked] == [(4,), (12,), (20,)]
    for choice in asked:  # times that rise with the rank are met exactly in between
        timed = times[choice]
        assert timed is not None
        assert timed.after_ms == pytest.approx(choice.rank[0] / 32, rel=1e-9)
        assert timed.at_most_ms == pytest.approx(1.1 * choice.rank[0] / 32, rel=1e-9)


def test_another_machines_table_is_never_measured_into(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, path = Clock(monkeypatch), tmp_path / "t.json"
    table = named_table(HERE, path)
    table.times(prepared.model, prepared.layers[0], choices(4, 12))
    table.save()
    content = json.loads(path.read_text())
    content["machine"]["processor"] = "another"
    path.write_text(json.dumps(content))
    clock.asked.clear()
    foreign = named_table(HERE, path)
    assert foreign.foreign
    between = foreign.time(prepared.model, prepared.layers[0], choices(8)[0])
    beyond = foreign.time(prepared.model, prepared.layers[0], choices(24)[0])
    assert between is not None
    assert beyond is not None
    assert between.after_ms == pytest.approx(8 / 32, rel=1e-9)
    assert beyond.after_ms == pytest.approx(24 / 32, rel=1e-9)
    assert foreign.estimated == 0
    unknown = foreign.time(prepared.model, prepared.layers[2], choices(8)[0])
    assert unknown is not None
    assert foreign.estimated == 1
    assert 0 < unknown.after_ms < unknown.before_ms
    assert clock.asked == []
    foreign.save()
    assert json.loads(path.read_text()) == content


def test_ranks_of_equal_work_stand_beside_each_other(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many channels in as out, ranks (8, 16) and (16, 8) cost the same."""
    Clock(monkeypatch)
    table, tucker = LatencyTable(HERE), find_pass("tucker2")
    for rank in ((8, 16), (16, 8), (16, 16)):
        table.time(prepared.model, prepared.layers[0], Choice(tucker, rank))
    table.measures = False
    between = table.time(prepared.model, prepared.layers[0], Choice(tucker, (12, 12)))
    assert between is not None

    assert 8 / 32 <= between.after_ms <= 16 / 32


@pytest.mark.parametrize("rank", ["3", "3,3,3,3", "33,4"])
def test_ranks_that_the_method_has_not_say_nothing(
    rank: str, prepared: Prepared, tmp_path: Path
) -> None:
    path, layer = tmp_path / "t.json", prepared.layers[0]
    key = layer_latency.signature(layer, layer.uses[0])
    times = {key: {"tucker2": {rank: [1.0, 0.5, 0.6], "8,8": [1.0, 0.25, 0.3]}}}
    path.write_text(json.dumps({"machine": {"processor": "another"}, "times": times}))
    choice = Choice(find_pass("tucker2"), (16, 16))
    timing = named_table(HERE, path).time(prepared.model, layer, choice)
    del times[key]["tucker2"][rank]
    path.write_text(json.dumps({"machine": {"processor": "another"}, "times": times}))
    assert timing is not None
    assert timing == named_table(HERE, path).time(prepared.model, layer, choice)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"machine": {}, "times": []}',
        '{"machine": {}, "times": {"a": {"svd": {"x": null}}}}',
        '{"machine": {}, "times": {"a": {"svd": {"4": [1, 2]}}}}',
        '{"machine": {}, "times": {"a": {"svd": {"4": [1, 2, -1]}}}}',
        '{"machine": {}, "times": {"a": [1]}}',
        '{"machine": {}, "times": {"a": {"svd": {"04": [1, 2, 3]}}}}',
    ],
)
def test_what_is_no_table_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="is no latency table"):
        onnxlr.optimize(two_convs(), latency_table=path)
    assert path.read_text() == content


def test_estimates_follow_the_work(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, table = Clock(monkeypatch), LatencyTable(HERE, measures=False)
    times = [table.time(prepared.model, prepared.layers[0], c) for c in choices(2, 8, 31)]
    timings = [t for t in times if t is not None]
    assert [t.after_ms for t in timings] == sorted(t.after_ms for t in timings)
    assert timings[0].faster
    assert not timings[2].faster  # 93% of the work in two nodes instead of one
    assert clock.asked == []


def test_a_table_along_its_second_axis_is_timed() -> None:
    model = make_model(
        [node("Gather", ["t", "i"], "y", axis=1)],
        {"i": (16,)},
        ["y"],
        {"t": np.ones((300, 40), np.float32)},
        dtype="int64",
    )
    model.graph.output[0].type.tensor_type.elem_type = 1
    prepared = prepare(load(model), feed=None)
    (layer,) = prepared.layers
    choice = Choice(find_pass("embedding-svd"), (2,))
    time = LatencyTable(HERE, limits=Limits(layer_seconds=0.01)).time(prepared.model, layer, choice)
    assert time is not None
    assert time.before_ms > 0


def test_nothing_is_timed_where_nothing_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: Any, **__: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr("onnxlr.verify.latency.interleave", timed)
    monkeypatch.setattr("onnxlr.verify.layer_latency.timed_apart", timed)
    rng = np.random.default_rng(0)
    low = (rng.standard_normal((256, 8)) @ rng.standard_normal((8, 256))).astype(np.float32)
    model = linear(low)
    result = onnxlr.optimize(model, measure=False, metric="rel-error", max_drop=0.01)
    assert result.report.speed is None
    assert result.report.to_dict()["speed"]["speedup"] is None
    assert len(result.plan.replaced) == 1
    assert any("nothing was timed" in note for note in result.report.notes)
    share = onnxlr.optimize(
        model, measure=False, metric="rel-error", max_drop=0.01, target="latency=0.5"
    )
    (row,) = share.plan.replaced
    assert row.before_ms is not None
    assert row.after_ms is not None
    assert row.after_ms <= 0.5 * row.before_ms


def test_a_table_that_nothing_was_needed_for(tmp_path: Path) -> None:
    """The ranks are named, and no latency is asked for."""
    path = tmp_path / "t.json"
    result = onnxlr.optimize(two_convs(), rank=4, max_drop=1, latency_table=path, measure=False)
    assert not path.exists()
    assert any("t.json was not written" in note for note in result.report.notes)


def test_a_named_table_is_written_and_serves_the_next_run(tmp_path: Path) -> None:
    path, model = tmp_path / "t.json", two_convs()
    options: dict[str, Any] = {"latency_table": path, "metric": "rel-error", "max_drop": 0.5}
    onnxlr.optimize(model, **options)
    written = json.loads(path.read_text())
    assert written["times"]
    onnxlr.optimize(model, **options)
    assert json.loads(path.read_text()) == written
