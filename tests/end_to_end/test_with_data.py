"""Whole runs with data: budgets met or refused, factors that data decide, plans that replay."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.calibrate import kept
from onnxlr.cli.commands import main
from onnxlr.methods.choice import Choice
from onnxlr.model.load import load
from onnxlr.plan import probing, sensitivity
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.plan import Plan
from onnxlr.rewrite import sequential
from onnxlr.system import pool
from onnxlr.system.cache import open_cache
from onnxlr.system.entries import RowsKind
from tests.support.builders import linear, low_rank, make_model, node, relative, run
from tests.support.limits import SHORT, short_runs
from tests.support.networks import images, network, products

WITHIN: dict[str, Any] = {"metric": "rel-error", "max_drop": 1}
CHAINS = "channel-svd", "embedding-svd", "input-channel-svd", "spatial-svd", "svd", "tucker2"
HALF = WITHIN | {"target": "macs=0.5", "method": CHAINS}
BY_CHAINS = tuple(f"--method={name}" for name in CHAINS)


@dataclass(frozen=True)
class Halved:
    """The network at half of its multiply-accumulates, and all that the run read and left.

    Attributes
    ----------
    source, out, data, cache : Path
    result : Result
    damages : list of (float, dict of str to Choice)
        What each set of choices that was judged as a whole does to the outputs.
    """

    source: Path
    out: Path
    data: Path
    cache: Path
    result: onnxlr.Result
    damages: list[tuple[float, dict[str, Choice]]]


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Halved:
    folder = tmp_path_factory.mktemp("halved")
    source, out, data, cache = (folder / n for n in ("net.onnx", "o.onnx", "d.npz", "cache"))
    onnx.save(network(), source)
    np.savez(data, x=images(128, 0))
    unpatched, damages = Evaluator.damage, list[tuple[float, dict[str, Choice]]]()

    def spying(self: Evaluator, choices: Mapping[str, Choice], samples: int) -> float:
        damages.append((unpatched(self, choices, samples), dict(choices)))
        return damages[-1][0]

    with short_runs(cache) as patch:
        patch.setattr(Evaluator, "damage", spying)
        patch.setattr(kept, "_BYTES_PER_SECOND", np.inf)  # they are kept however fast they are made
        result = onnxlr.optimize(source, out, data=data, **HALF)
    return Halved(source, out, data, cache, result, damages)


@pytest.fixture(scope="module")
def without_sequence(halved: Halved) -> onnxlr.Result:
    """The result of the same run without sequential correction."""
    with short_runs(halved.cache):
        return onnxlr.optimize(halved.source, data=halved.data, without="sequential", **HALF)


@pytest.fixture
def data(halved: Halved, tmp_path: Path) -> Path:
    """The samples, and a cache that knows the candidates of the network on them."""
    shutil.copytree(halved.cache, os.environ["ONNXLR_CACHE"])
    return Path(shutil.copy(halved.data, tmp_path))


def test_a_share_of_the_multiply_accumulates_is_met(data: Path) -> None:
    model = network()
    damages = []
    for share in (0.8, 0.4):
        result = onnxlr.optimize(model, data=data, **HALF | {"target": f"macs={share}"})
        report = result.report
        assert report.output.macs <= share * report.input.macs
        assert report.output.macs > 0.75 * share * report.input.macs
        assert report.quality is not None
        damages.append(report.quality.optimized)
    assert damages == sorted(damages)
    assert damages[0] < 0.75 * damages[-1]


@pytest.mark.parametrize("goal", ["params", "bytes"])
def test_a_share_of_the_size_is_met(goal: str, data: Path) -> None:
    result = onnxlr.optimize(
        network(), data=data, target=f"{goal}=0.5", metric="rel-error", max_drop=1
    )
    before, after = result.report.input, result.report.output
    assert getattr(after, goal) <= 0.5 * getattr(before, goal)


@pytest.mark.parametrize("batch", [1, 4])
def test_shapes_of_a_replay_are_those_of_the_run(batch: int, tmp_path: Path) -> None:
    """Whether channels are followed through a Reshape hangs on the batch of the shapes."""
    rng = np.random.default_rng(0)
    sizes = {"w1": (64, 96), "w2": (96, 80), "w3": (80, 8)}
    model = make_model(
        [
            node("MatMul", ["x", "w1"], "h", "first"),
            node("Reshape", ["h", "flat"], "f"),
            node("Relu", ["f"], "a"),
            node("Reshape", ["a", "back"], "b"),
            node("MatMul", ["b", "w2"], "c", "second"),
            node("Relu", ["c"], "d"),
            node("MatMul", ["d", "w3"], "y", "third"),
        ],
        {"x": ("n", 64)},
        ["y"],
        {
            **{n: rng.standard_normal(s).astype(np.float32) / 8 for n, s in sizes.items()},
            "flat": np.array([-1]),
            "back": np.array([-1, 96]),
        },
    )
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((400, 64)).astype(np.float32))
    result = onnxlr.optimize(
        model, data=tmp_path / "d.npz", rank=16, max_drop=1, measure=False, batch=batch
    )
    assert result.plan.replaced
    plan = Plan.from_json(result.plan.to_json(), "plan")
    assert onnxlr.apply(plan, model).SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize("method", ["svd", "tiled-svd"])
@pytest.mark.parametrize("directions", [0, 5, 64])
def test_a_rank_that_holds_the_weight_holds_it_for_all_inputs(
    method: str, directions: int, tmp_path: Path
) -> None:
    """Whatever few directions the samples have, factors keep to the weight in the others."""
    rng = np.random.default_rng(0)
    weight = low_rank(rng, 64, 48, 8)
    x = np.zeros((400, 64), np.float32)
    x[:, :directions] = rng.standard_normal((400, directions))
    np.savez(tmp_path / "d.npz", x=x)
    rank = "8" if method == "svd" else "8,2,2"
    result = onnxlr.optimize(
        linear(weight, rows="n"),
        data=tmp_path / "d.npz",
        method=method,
        rank=rank,
        max_drop=1,
        measure=False,
        metric="rel-error",
    )
    (row,) = result.plan.replaced
    assert row.error is not None
    assert row.error < 1e-4


def test_a_product_with_what_a_caller_may_feed(tmp_path: Path) -> None:
    """A state with a default is an input, though exporters store it like a weight."""
    rng = np.random.default_rng(0)
    model = make_model(
        [
            node("MatMul", ["h", "w"], "a", "state"),
            node("Add", ["a", "x"], "y"),
        ],
        {"x": (4, 48), "h": (4, 64)},
        ["y"],
        {"w": low_rank(rng, 64, 48, 3), "h": np.zeros((4, 64), np.float32)},
    )
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((8, 48)).astype(np.float32))
    feed = {"x": np.ones((4, 48), np.float32), "h": rng.standard_normal((4, 64), np.float32)}
    for data in (None, tmp_path / "d.npz"):
        result = onnxlr.optimize(
            model, data=data, rank=3, max_drop=1, measure=False, metric="rel-error"
        )
        assert [d.name for d in result.plan.replaced] == ["state"]
        assert result.report.input.macs == 4 * 64 * 48
        assert relative(run(model, feed)[0], run(result.model, feed)[0]) < 1e-4


def test_more_layers_than_sequence_has_time_for(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequential correction would build one model for every layer."""
    monkeypatch.setattr("onnxlr.api.functions.LIMITS", replace(SHORT, building_seconds=0.0))

    def correct(*_: Any, **__: Any) -> None:
        raise AssertionError("was corrected")

    monkeypatch.setattr("onnxlr.plan.evaluate.correct", correct)
    result = onnxlr.optimize(
        network(), data=data, rank=4, max_drop=1, measure=False, metric="rel-error"
    )
    assert len(result.plan.replaced) > 1
    assert any("not corrected in sequence" in note for note in result.report.notes)


def test_a_bias_that_a_caller_may_feed_stays_an_input(data: Path) -> None:
    """Its correction is added whatever a caller feeds in its place."""
    model = network()
    model.graph.input.append(onnx.helper.make_tensor_value_info("b3", 1, [16]))
    result = onnxlr.optimize(
        model, data=data, rank=6, include="conv3", max_drop=1, measure=False, metric="rel-error"
    )
    assert len(result.plan.replaced) == 1
    assert [v.name for v in result.model.graph.input] == ["x", "b3"]
    bias = onnx.numpy_helper.to_array(model.graph.initializer[4])
    assert model.graph.initializer[4].name == "b3"
    feed = {"x": images(64, 3)}
    for fed in (feed, feed | {"b3": bias + 1}):
        error = relative(run(model, fed)[0], run(result.model, fed)[0])
        assert error < 1.5 * result.report.quality.fidelity.rel_error  # type: ignore[union-attr]


def test_a_share_is_met_though_biases_come_on_top(tmp_path: Path) -> None:
    """Rank 17 would leave 60 parameters free, and takes 64 for the bias that corrects it."""
    rng = np.random.default_rng(3)
    weights = {"w": rng.standard_normal((48, 64)) / 7, "v": rng.standard_normal((64, 10)) / 8}
    nodes = [node("MatMul", ["x", "w"], "h"), node("Relu", ["h"], "r")]
    model = make_model(
        [*nodes, node("MatMul", ["r", "v"], "y")],
        {"x": ["n", 48]},
        ["y"],
        {name: a.astype(np.float32) for name, a in weights.items()},
    )
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((200, 48)).astype(np.float32) + 0.5)
    share = ((48 + 64) * 17 + 60 + 640) / 3712
    result = onnxlr.optimize(
        model,
        data=tmp_path / "d.npz",
        metric="cosine",
        max_drop=1,
        exclude="v",
        measure=False,
        target=f"params={share:.4f}",
    )
    ((rank,),) = (d.rank for d in result.plan.replaced if d.rank is not None)
    assert 14 <= rank <= 16
    assert result.report.output.params == (48 + 64) * rank + 64 + 640


def test_a_budget_that_cannot_be_met_is_exit_code_3(data: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "o.onnx"
    onnx.save(network(), source)

    def optimize(*options: str) -> Any:
        command = ("optimize", str(source), str(out), "--data", str(data), *BY_CHAINS, *options)
        return CliRunner().invoke(main, command, catch_exceptions=False)

    done = optimize("--target", "macs=0.001", "--max-drop", "1")
    assert done.exit_code == 3
    assert "--target macs=0.001 can't be met" in done.stderr
    assert "of the model's macs" in done.stderr
    done = optimize("--target", "macs=0.3", "--metric", "rel-error", "--max-drop", "0.0001")
    assert done.exit_code == 3
    assert "outside the accuracy allowed" in done.stderr
    assert "the limit is 0.0001" in done.stderr
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(onnxlr.BudgetError):
        onnxlr.optimize(source, data=data, target="bytes=0.001", max_drop=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "macs=1.5"}, "between 0 and 1"),
        ({"target": "macs=x"}, "between 0 and 1"),
        ({"target": "flops=0.5"}, "latency, macs, params or bytes"),
        ({"target": "macs=0.5", "rank": 8}, "--rank 8 names them"),
        ({"target": "macs=0.5", "verify": "none"}, "needs a run"),
    ],
)
def test_targets_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(onnxlr.UsageError, match=words):
        onnxlr.optimize(network(), **options)


def test_data_make_better_factors_than_the_weight_alone(data: Path) -> None:
    """Methods and ranks are the same; factors are fitted to the samples or to the weight."""
    model = network()
    held_out = {"x": images(64, 99)}
    apart = {}
    for samples in (None, data):
        result = onnxlr.optimize(
            model, data=samples, rank=6, method=("channel-svd", "svd"), max_drop=1
        )
        assert {d.decision for d in result.plan.replaced} == {"channel-svd", "svd"}
        apart[samples] = relative(run(model, held_out)[0], run(result.model, held_out)[0])
        lost = [d.output_error for d in result.plan.replaced]
        assert all((o is None) == (samples is None) for o in lost)
    assert apart[data] < 0.7 * apart[None]


def test_sequential_correction_helps_and_says_so(data: Path) -> None:
    def damage(*without: str) -> tuple[float, onnxlr.Result]:
        result = onnxlr.optimize(
            network(),
            data=data,
            rank=4,
            metric="rel-error",
            max_drop=1,
            method="channel-svd",
            without=without,
        )
        assert result.report.quality is not None
        return result.report.quality.fidelity.rel_error, result

    corrected, result = damage()
    assert result.plan.calibration is not None
    assert result.plan.calibration.sequential == 42  # a third of the 128
    assert any("corrected in sequence" in note for note in result.report.notes)
    uncorrected, plain = damage("sequential")
    assert plain.plan.calibration is not None
    assert plain.plan.calibration.sequential == 0
    assert corrected < 0.97 * uncorrected


def test_a_plan_fitted_to_data_replays_to_the_byte(halved: Halved, tmp_path: Path) -> None:
    source, out, data, again = halved.source, halved.out, halved.data, tmp_path / "p.onnx"
    text = halved.result.plan.to_json()
    plan = Plan.from_json(text)
    assert plan == halved.result.plan
    assert plan.calibration is not None
    assert plan.calibration.share == (1, 3)
    onnxlr.apply(plan, source, again)
    assert out.read_bytes() == again.read_bytes()
    assert load(out).model.metadata_props["onnxlr_plan"] == plan.digest

    moved = tmp_path / "moved.npz"
    shutil.move(data, moved)
    try:
        with pytest.raises(onnxlr.UsageError, match=r"no such file.*--data"):
            onnxlr.apply(plan, source, again)
        onnxlr.apply(plan, source, again, data=moved)
        assert out.read_bytes() == again.read_bytes()
        np.savez(data, x=images(128, 1))
        with pytest.raises(onnxlr.UsageError, match="doesn't hold the samples"):
            onnxlr.apply(plan, source, again)
    finally:
        shutil.move(moved, data)
    content = json.loads(text)
    del content["calibration"]["share"]
    for half, share in ((True, (1, 2)), (False, (1, 1))):  # as plans were written before
        content["calibration"]["half"] = half
        earlier = Plan.from_json(json.dumps(content)).calibration
        assert earlier is not None
        assert earlier.share == share
        assert earlier.count(21) == (10 if half else 21)
    broken = json.loads(text) | {"calibration": {"data": 3}}
    with pytest.raises(onnxlr.UsageError, match="is no onnxlr plan"):
        Plan.from_json(json.dumps(broken))


def test_calibration_may_lack_the_labels_that_validation_has(tmp_path: Path) -> None:
    model, x = network(), images(64, 5)
    labels = run(model, {"x": x})[0].argmax(-1)
    np.savez(tmp_path / "c.npz", x=images(64, 6))
    np.savez(tmp_path / "v.npz", x=x, label=labels)
    result = onnxlr.optimize(
        model,
        data=tmp_path / "c.npz",
        validation=tmp_path / "v.npz",
        labels="label",
        target="macs=0.8",
        max_drop=0.5,
    )
    assert result.report.quality is not None
    assert result.report.quality.metric == "top1"
    assert result.report.quality.original == 1.0
    assert result.plan.calibration is not None
    assert result.plan.calibration.share == (2, 3)


@pytest.mark.usefixtures("data")
def test_a_second_run_reuses_what_the_first_computed(
    halved: Halved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("onnxlr.plan.weigh.layer_candidates", again)
    monkeypatch.setattr("onnxlr.plan.probing.probe", again)
    monkeypatch.setattr("onnxlr.calibrate.stage.calibrate", lambda *_: {})
    second = onnxlr.optimize(network(), data=halved.data, **HALF)
    assert second.plan == halved.result.plan
    assert second.model == halved.result.model
    other = HALF | {"target": "macs=0.7"}
    assert onnxlr.optimize(network(), data=halved.data, **other).plan.replaced
    with pytest.raises(AssertionError, match="computed again"):
        onnxlr.optimize(network(seed=1), data=halved.data, **HALF)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """Samples of the small network, the cache of its first run, and the plan."""
    folder = tmp_path_factory.mktemp("small")
    x = np.random.default_rng(3).standard_normal((128, 48)).astype(np.float32)
    np.savez(folder / "d.npz", x=x)
    with short_runs(folder / "cache"):
        plan = onnxlr.optimize(products(), data=folder / "d.npz", **HALF).plan
    assert plan.replaced
    return folder / "d.npz", folder / "cache", plan


@pytest.mark.parametrize(
    "broken",
    [
        5,
        {"candidates": [5], "why": ""},
        {"candidates": [{"method": {}, "rank": [1], "error": 0.1, "note": ""}], "why": ""},
        {"candidates": [{"method": "svd", "rank": None, "error": 0.1, "note": ""}], "why": ""},
        {"candidates": [{"method": "svd", "rank": [], "error": 0.1, "note": ""}], "why": ""},
        {"candidates": [{"method": "svd", "rank": [9999], "error": 0.1, "note": ""}], "why": ""},
        {"candidates": [{"method": "svd", "rank": [1], "error": float("nan")}], "why": ""},
        {"candidates": [], "why": None},
        {"refusal": 5},
        {"error": "much", "harm": 0.1, "divergence": None},
        {"error": 0.1},
    ],
    ids=str,
)
def test_entries_of_the_cache_that_are_none(broken: Any, small: tuple[Path, Path, Plan]) -> None:
    """Whoever may write to a shared cache could make them: what they hold is computed anew."""
    data, first_cache, plan = small
    shutil.copytree(first_cache, os.environ["ONNXLR_CACHE"])
    cache = open_cache()
    kinds: tuple[RowsKind, ...] = ("candidates", "sensitivities")
    for kind in kinds:
        (path,) = Path(os.environ["ONNXLR_CACHE"]).glob(f"{kind}-*.json")
        key = path.stem.removeprefix(f"{kind}-")
        rows = cache.read(kind, key)
        assert rows
        cache.write(kind, key, dict.fromkeys(rows, broken))
    assert onnxlr.optimize(products(), data=data, **HALF).plan == plan


def test_measuring_sensitivities_goes_on_where_it_stopped(
    small: tuple[Path, Path, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpatched, probed = sensitivity.probe, list[tuple[str, Choice]]()

    def stopping(*arguments: Any) -> dict[str, Any]:
        if len(probed) == 2:
            raise KeyboardInterrupt
        return counting(*arguments)

    def counting(*arguments: Any) -> dict[str, Any]:
        _, _, _, name, choice, _ = arguments
        probed.append((name, choice))
        return unpatched(*arguments)

    def optimize() -> None:
        onnxlr.optimize(products(), data=small[0], jobs=1, **HALF)

    monkeypatch.setattr(probing, "probe", stopping)
    with pytest.raises(KeyboardInterrupt):
        optimize()
    monkeypatch.setattr(probing, "probe", counting)
    optimize()
    assert {name for name, _ in probed} == {"first", "second", "third"}
    assert len(set(probed)) == len(probed) > 4


@pytest.mark.usefixtures("data")
def test_what_is_left_out_is_not_used(halved: Halved, without_sequence: onnxlr.Result) -> None:
    data, whole, apart = halved.data, halved.result, without_sequence
    plain = onnxlr.optimize(network(), data=data, without="data", **HALF)
    assert plain.plan.calibration is None
    assert all(d.output_error is None for d in plain.plan.replaced)
    assert any("left out on request: data" in note for note in plain.report.notes)
    blunt = onnxlr.optimize(network(), data=data, without=["sensitivity"], **HALF)
    unchanged = {a.harm == a.error for d in blunt.plan.decisions for a in d.alternatives}
    assert unchanged == {True}
    assert apart.plan.calibration is not None
    assert apart.plan.calibration.sequential == 0
    for result in (whole, plain, blunt, apart):
        assert result.report.output.macs <= 0.5 * result.report.input.macs
    assert whole.report.quality is not None
    assert plain.report.quality is not None
    assert whole.report.quality.optimized < 0.9 * plain.report.quality.optimized
    with pytest.raises(onnxlr.UsageError, match="data, sensitivity, sequential, widths"):
        onnxlr.optimize(network(), without="luck", **HALF)


def test_sets_of_equal_cost_are_judged_as_a_whole(
    halved: Halved, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, result = halved.damages, halved.result
    assert len(measured) > 2
    best = min(measured, key=lambda pair: pair[0])[1]
    assert {n: (c.graph_pass.name, c.rank) for n, c in best.items()} == {
        d.name: (d.decision, d.rank) for d in result.plan.replaced
    }
    assert any("files were built, saved and judged" in note for note in result.report.notes)

    def judged(*_: Any) -> float:
        raise AssertionError("random inputs are nothing to choose by")

    monkeypatch.setattr(Evaluator, "damage", judged)
    onnxlr.optimize(network(), **HALF)


def test_all_that_was_weighed_is_in_the_plan(without_sequence: onnxlr.Result) -> None:
    result = without_sequence  # with it a layer's error on the original's inputs may rise
    text = result.plan.to_json()
    read = Plan.from_json(text)
    assert read == result.plan
    for row in result.plan.replaced:
        ranks = {(a.method, a.rank): a for a in row.alternatives}
        assert len(ranks) > 3
        chosen = ranks[row.decision, row.rank or ()]
        assert chosen.macs == row.macs_after
        assert chosen.error is not None
        assert row.output_error is not None
        # A glance predicts; the factors that are written are fitted to the end.
        assert 0.85 * chosen.error <= row.output_error <= 1.05 * chosen.error
        assert chosen.harm is not None
    assert all(len(line) < 1000 for line in text.splitlines())


def test_the_report_is_written_as_a_page(data: Path, tmp_path: Path) -> None:
    source, out, page = (tmp_path / name for name in ("net.onnx", "o.onnx", "r.html"))
    onnx.save(network(), source)
    command = ["optimize", str(source), str(out), "--data", str(data), *BY_CHAINS]
    command += ["--report", str(page)]
    done = CliRunner().invoke(
        main, [*command, "--metric", "rel-error", "--target", "macs=0.5", "--max-drop", "1"]
    )
    assert done.exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    for words in ("conv1", "conv2", "conv3", "fc", "--target macs=0.5", "onnxruntime"):
        assert words in text
    assert text.count("<svg") > 4
    refused = CliRunner().invoke(main, [*command[:-1], str(source)])
    assert refused.exit_code == 2
    missing = CliRunner().invoke(main, [*command[:-1], str(tmp_path / "no" / "r.html")])
    assert missing.exit_code == 1
    assert "doesn't exist" in missing.stderr


def test_the_page_shows_chosen_ranks_wherever_they_were_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes that come back from other processes are other objects of the same name."""
    monkeypatch.setattr(pool, "_START_SECONDS", 0.0)
    page = tmp_path / "r.html"
    options: dict[str, Any] = {"target": "params=0.6", "metric": "rel-error", "max_drop": 1}
    result = onnxlr.optimize(network(), report=page, jobs=2, **options)
    text = page.read_text(encoding="utf-8")
    for row in result.plan.replaced:
        assert f"{row.decision}: rank {','.join(map(str, row.rank or ()))};" in text


def test_correction_knows_of_a_relu(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Relu cuts off need not be matched, so that the outputs come closer."""

    def apart() -> float:
        result = onnxlr.optimize(
            network(), data=data, rank=4, metric="rel-error", max_drop=1, method="channel-svd"
        )
        return relative(run(network(), held_out)[0], run(result.model, held_out)[0])

    held_out = {"x": images(256, 99)}
    with_relu = apart()
    monkeypatch.setattr("onnxlr.rewrite.pairs.bias_before_relu", lambda _: None)
    assert with_relu < 0.98 * apart()


def test_the_best_z_behind_a_relu() -> None:
    """No z of a dense grid has a lower (wanted − max(z, 0))² + penalty · (z − reached)²."""
    rng = np.random.default_rng(0)
    wanted = np.maximum(rng.standard_normal(50), 0).astype(np.float32)
    reached = rng.standard_normal(50).astype(np.float32)
    grid = np.linspace(-5, 5, 20001)
    for penalty in (0.1, 1.0):
        z = sequential._let_through(wanted, reached, penalty)
        cost = (wanted - np.maximum(z, 0)) ** 2 + penalty * (z - reached) ** 2
        all_costs = (wanted[:, None] - np.maximum(grid, 0)) ** 2 + penalty * (
            grid - reached[:, None]
        ) ** 2
        assert np.allclose(cost, all_costs.min(axis=1), rtol=1e-3, atol=1e-6)
