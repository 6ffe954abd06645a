"""Runs that narrow widths: what they write, say and replay."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.plan.plan import Plan
from onnxlr.progress import Silent
from tests.support.builders import Array, make_model, node, relative, run
from tests.support.planted import CHANNELS, GOES, planted

SIZES = (24, 64, 96, 48, 10)


def network(seed: int = 0) -> onnx.ModelProto:
    """Four fully connected layers."""
    rng = np.random.default_rng(seed)
    nodes, weights, value = [], {}, "x"
    for i, (a, b) in enumerate(itertools.pairwise(SIZES)):
        weights[f"w{i}"] = (rng.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32)
        weights[f"b{i}"] = (0.1 * rng.standard_normal(b)).astype(np.float32)
        last = i == len(SIZES) - 2
        output = "y" if last else f"h{i}"
        nodes.append(node("Gemm", [value, f"w{i}", f"b{i}"], output, f"fc{i}"))
        if not last:
            nodes.append(node("Relu", [output], f"a{i}"))
        value = f"a{i}"
    return make_model(nodes, {"x": ("n", SIZES[0])}, ["y"], weights)


def samples(count: int, seed: int) -> Array:
    """Inputs in a space of few dimensions: so activations hang together."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(0).standard_normal((6, SIZES[0]))
    return np.asarray(rng.standard_normal((count, 6)) @ basis / np.sqrt(6), dtype=np.float32)


@pytest.fixture
def files(here: Path) -> Path:
    """A folder with a model and samples for it."""
    onnx.save(network(), here / "in.onnx")
    np.save(here / "x.npy", samples(400, 1))
    return here


def invoke(*words: str) -> Any:
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "interpolative", "--rank", "0.5"],
        ["--method", "interpolative", "--rank", "energy:0.99"],
        ["--method", "interpolative", "--target", "macs=0.5"],
        ["--target", "macs=0.4"],
        ["--method", "interpolative,svd", "--rank", "24"],
        ["--method", "interpolative", "--target", "params"],
    ],
    ids=" ".join,
)
def test_a_plan_replays_to_the_byte(options: list[str], files: Path) -> None:
    data = ["--data", "x.npy", "--metric", "rel-error", "--max-drop", "1"]
    plan = ["--plan-out", "plan.json", "--json", "report.json", "--report", "page.html"]
    invoke("optimize", "in.onnx", "out.onnx", *data, *plan, *options)
    report = json.loads((files / "report.json").read_text())
    narrowed = [row for row in report["widths"] if row["kept"] is not None]
    assert narrowed
    assert report["output"]["macs"] < report["input"]["macs"]
    model = onnx.load(files / "out.onnx")
    stored = Plan.from_json((files / "plan.json").read_text())
    assert {p.key: p.value for p in model.metadata_props}["onnxlr_plan"] == stored.digest
    kept = {row["name"]: tuple(row["kept"]) for row in narrowed}
    assert stored.widths.kept == kept
    assert "widths narrowed" in (files / "page.html").read_text()
    invoke("apply", "plan.json", "in.onnx", "again.onnx")
    assert (files / "again.onnx").read_bytes() == (files / "out.onnx").read_bytes()


@pytest.mark.parametrize("rank_declared", [True, False])
def test_a_plan_without_samples_replays_where_only_a_run_tells_shapes(
    rank_declared: bool, here: Path
) -> None:
    rng = np.random.default_rng(0)
    once = rng.standard_normal((6, 16)).astype(np.float32)
    nodes = [
        node("Shape", ["x"], "s"),
        node("Cast", ["s"], "f", to=onnx.TensorProto.FLOAT),
        node("Mul", ["f", "one"], "g"),
        node("Cast", ["g"], "i", to=onnx.TensorProto.INT64),
        node("Reshape", ["x", "i"], "same"),  # of what shape, inference doesn't tell
        node("MatMul", ["same", "v"], "h", "first"),
        node("Add", ["h", "b"], "z"),
        node("Relu", ["z"], "a"),
        node("MatMul", ["a", "w"], "y", "second"),
    ]
    weights = {
        "one": np.ones(1, np.float32),
        "v": np.concatenate([once, once], axis=1),
        "b": np.zeros(32, np.float32),
        "w": rng.standard_normal((32, 10)).astype(np.float32),
    }
    model = make_model(nodes, {"x": ("n", "t", 6)}, ["y"], weights)
    if not rank_declared:
        model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, here / "in.onnx")
    sizes = ["--shape", "x:2,3,6", "--batch", "2"]
    named = ["--method", "interpolative", "--rank", "exact", "--no-measure"]
    invoke("optimize", "in.onnx", "out.onnx", *sizes, *named, "--plan-out", "plan.json")
    plan = Plan.from_json((here / "plan.json").read_text())
    assert [len(kept) for kept in plan.widths.kept.values()] == [16]
    invoke("apply", "plan.json", "in.onnx", "again.onnx")
    assert (here / "again.onnx").read_bytes() == (here / "out.onnx").read_bytes()


@pytest.mark.usefixtures("files")
def test_layers_say_what_became_of_them() -> None:
    result = onnxlr.optimize(
        "in.onnx", data="x.npy", method="interpolative", rank="0.5", metric="rel-error", max_drop=1
    )
    rows = {row.name: row for row in result.report.decisions}
    assert [row.decision for row in rows.values()] == ["interpolative"] * 4
    assert rows["fc1"].rank == (32, 48)
    assert rows["fc1"].params_before == 64 * 96
    assert rows["fc1"].params_after == 32 * 48
    assert rows["fc1"].macs_after == 32 * 48
    assert "inputs 64 → 32, outputs 96 → 48" in rows["fc1"].reason
    assert len(result.model.graph.node) == len(network().graph.node)
    widths = {row.name: row for row in result.report.widths}
    assert widths["fc3"].reason == "an output of the model"
    assert [len(w.kept or ()) for w in widths.values()] == [32, 48, 24, 0]


@pytest.mark.usefixtures("files")
def test_layers_that_stay_say_where_channels_are_fewer() -> None:
    options: dict[str, Any] = {"method": "interpolative", "rank": "0.5", "metric": "rel-error"}
    result = onnxlr.optimize("in.onnx", data="x.npy", exclude="fc2", max_drop=1, **options)
    rows = {row.name: row for row in result.report.decisions}
    assert result.plan.widths.kept.keys() == {"fc0"}
    assert [rows[n].decision for n in ("fc0", "fc1", "fc3")] == ["interpolative"] * 2 + ["keep"]
    asked = "are all that was asked for"  # no chains, to which they could be compared
    assert rows["fc1"].reason == f"inputs 64 → 32; fewer channels around it {asked}"
    assert rows["fc3"].reason == f"fewer channels elsewhere {asked}"


@pytest.mark.usefixtures("files")
def test_the_readers_make_up_for_what_goes() -> None:
    """Cut and nothing else, the model would lose several times as much."""
    result = onnxlr.optimize(
        "in.onnx", data="x.npy", method="interpolative", rank="0.75", metric="rel-error", max_drop=1
    )
    feed = {"x": samples(200, 2)}
    before, after = run(network(), feed)[0], run(result.model, feed)[0]
    error = relative(before, after)
    cut = onnx.load_from_string(result.model.SerializeToString())
    kept = result.plan.widths.kept
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in network().graph.initializer}
    stay = [np.arange(SIZES[0]), *(np.array(kept[f"fc{i}"]) for i in range(3)), np.arange(10)]
    for tensor in cut.graph.initializer:
        i = int(tensor.name[1:])
        whole = arrays[tensor.name]
        small = whole[stay[i + 1]] if whole.ndim == 1 else whole[np.ix_(stay[i], stay[i + 1])]
        tensor.CopyFrom(onnx.numpy_helper.from_array(small, tensor.name))
    assert error < 0.5 * relative(before, run(cut, feed)[0])


@pytest.mark.parametrize("data", [True, False])
def test_exact_takes_what_changes_nothing(data: bool, here: Path) -> None:
    model = planted(3, ["relu", "residual", "scaled"])
    onnx.save(model, here / "in.onnx")
    rng = np.random.default_rng(0)
    np.save(here / "x.npy", rng.standard_normal((60, 4, 8, 8)).astype(np.float32))
    options = ["--data", "x.npy"] if data else []
    words = ["--method", "interpolative", "--rank", "exact", "--plan-out", "p.json"]
    invoke("optimize", "in.onnx", "out.onnx", *words, *options, "--target", "params")
    invoke("apply", "p.json", "in.onnx", "again.onnx")
    assert (here / "again.onnx").read_bytes() == (here / "out.onnx").read_bytes()
    feed = {"x": rng.standard_normal((2, 4, 8, 8)).astype(np.float32)}
    small = onnx.load(here / "out.onnx")
    assert relative(run(model, feed)[0], run(small, feed)[0]) < 1e-5
    shapes = [list(t.dims) for t in small.graph.initializer if len(t.dims) == 4]
    assert [CHANNELS - GOES, 4, 3, 3] in shapes
    assert [6, CHANNELS - GOES, 1, 1] in shapes


@pytest.mark.usefixtures("files")
def test_widths_are_listed_before_anything_is_changed() -> None:
    rows = onnxlr.inspect("in.onnx")
    assert [(w.name, w.size, w.readers, w.refusal) for w in rows.widths] == [
        ("fc0", 64, ("fc1",), None),
        ("fc1", 96, ("fc2",), None),
        ("fc2", 48, ("fc3",), None),
        ("fc3", 10, (), "an output of the model"),
    ]
    assert onnxlr.inspect("in.onnx", method="svd").widths == ()
    done = invoke("inspect", "in.onnx", "--json", "-", "--quiet")
    assert json.loads(done.stdout)["widths"][0]["readers"] == ["fc1"]
    left = onnxlr.inspect("in.onnx", exclude="fc1").widths
    assert [w.refusal is None for w in left] == [False, False, True, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row | {"size": 65}, "no such width"),
        (lambda row: row | {"name": "other"}, "no such width"),
        (lambda row: row | {"kept": [3, 1]}, "no onnxlr plan"),
        (lambda row: row | {"kept": []}, "no onnxlr plan"),
        (lambda row: row | {"kept": [1, 64]}, "no onnxlr plan"),
    ],
)
def test_plans_for_other_widths_are_refused(change: Any, words: str, files: Path) -> None:
    result = onnxlr.optimize(
        "in.onnx", data="x.npy", method="interpolative", rank="0.5", metric="rel-error", max_drop=1
    )
    content = json.loads(result.plan.to_json())
    content["widths"]["rows"][0] = change(content["widths"]["rows"][0])
    (files / "p.json").write_text(json.dumps(content))
    with pytest.raises(onnxlr.UsageError, match=words):
        onnxlr.apply("p.json", "in.onnx")


@pytest.mark.usefixtures("files")
def test_without_widths_only_chains_are_looked_for() -> None:
    given: dict[str, Any] = {"data": "x.npy", "metric": "rel-error", "max_drop": 1}
    assert not onnxlr.optimize(
        "in.onnx", without="widths", target="macs=0.5", **given
    ).report.widths
    assert not onnxlr.optimize("in.onnx", method="svd", rank="0.2", **given).report.widths


@pytest.mark.parametrize("verify", ["layers", "none"])
def test_channels_do_not_go_from_a_model_that_is_not_judged_as_a_whole(
    files: Path, verify: str
) -> None:
    words = "in.onnx", "o.onnx", "--method", "svd,interpolative", "--verify", verify
    done = CliRunner().invoke(main, ["optimize", *words])
    assert done.exit_code == 2
    assert f"--verify {verify} can't judge: leave one of them out" in done.output
    assert not (files / "o.onnx").exists()


class Stages(Silent):
    """A display that notes which stages began, in order."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    @contextmanager
    def stage(self, description: str, total: int | None) -> Iterator[Callable[[str], None]]:
        self.begun.append(description)
        with super().stage(description, total) as step:
            yield step


@pytest.mark.usefixtures("files")
def test_with_fewer_channels_sensitivities_are_those_of_the_original() -> None:
    """They take as long as all the rest, and fewer channels hardly change them."""
    stages = Stages()
    options: dict[str, Any] = {"metric": "rel-error", "max_drop": 0.2, "target": "macs"}
    result = onnxlr.optimize("in.onnx", data="x.npy", progress=stages, **options)
    assert len(result.report.replaced) > 0
    assert stages.begun.count("weigh candidates") == 2
    assert stages.begun.count("measure sensitivities") == 1
    assert stages.begun.count("measure sensitivities of widths") == 1
    # The original is run by the judge who chooses, by the one who probes, and by the one who tests.
    assert stages.begun.count("run the original") == 3
