"""Whole runs that know what will be done to their result: all is judged and timed with that."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.errors import BudgetError, ModelError, UsageError
from onnxlr.model.load import load
from onnxlr.prepare.feeding import Feeding, choose_feeding
from onnxlr.prepare.opening import open_session
from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.verify.latency import compare_sessions
from tests.support.builders import Array, low_rank, make_model, node

X = np.random.default_rng(0).standard_normal((240, 128)).astype(np.float32)
SCALED = f"{__name__}:scaled"
HALF: dict[str, Any] = {
    "metric": "rel-error",
    "max_drop": 0.1,
    "target": "macs=0.4",
    "method": "svd",
    "measure": False,
}


def network() -> onnx.ModelProto:
    """Two products of 128, 96 and 64 features, of rank 6 but for some noise, and a Relu between."""
    rng = np.random.default_rng(1)
    u, v = low_rank(rng, 128, 96, 6), low_rank(rng, 96, 64, 6)
    noise = (0.02 * rng.standard_normal(w.shape).astype(np.float32) for w in (u, v))
    return make_model(
        [
            node("MatMul", ["x", "u"], "a", "first"),
            node("Relu", ["a"], "b"),
            node("MatMul", ["b", "v"], "y", "second"),
        ],
        {"x": ("n", 128)},
        ["y"],
        {name: w + e for name, w, e in zip("uv", (u, v), noise, strict=True)},
    )


@pytest.fixture
def source(here: Path) -> Path:
    path = here / "net.onnx"
    onnx.save(network(), path)
    np.savez(here / "data.npz", x=X)
    return path


def same(path: str) -> str:
    """Write the same model beside it."""
    copy = Path(path).with_suffix(".same.onnx")
    copy.write_bytes(Path(path).read_bytes())
    return str(copy)


def scaled(path: str, *, by: float, from_products: int = 0) -> str:
    """Scale the output, in place, of a model with so many products or more."""
    model = onnx.load(path)
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    if len(products) >= from_products:
        factor = onnx.numpy_helper.from_array(np.array(by, np.float32), "by")
        model.graph.initializer.append(factor)
        last = next(n for n in model.graph.node if n.output[0] == "y")
        last.output[0] = "unscaled"
        model.graph.node.append(node("Mul", ["unscaled", "by"], "y", "scale"))
    onnx.save(model, path)
    return path


def output(model: Path | onnx.ModelProto, x: Array = X) -> Array:
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    return np.asarray(onnxruntime.InferenceSession(content).run(None, {"x": x})[0])


def feeding_of(source: Path) -> Feeding:
    """The parts of the samples, as a run of seed 0 makes them."""
    loaded = load(source)
    session = open_session(loaded, ONE_CPU_THREAD)
    return choose_feeding(loaded, session, data=source.parent / "data.npz")


def test_a_step_that_does_nothing_changes_nothing(source: Path) -> None:
    plain = onnxlr.optimize(source, "plain.onnx", data="data.npz", **HALF)
    behind = onnxlr.optimize(source, "behind.onnx", data="data.npz", behind=same, **HALF)
    assert len(plain.plan.replaced) == 2
    assert behind.plan.to_json() == plain.plan.to_json()
    assert Path("behind.onnx").read_bytes() == Path("plain.onnx").read_bytes()
    onnxlr.apply(behind.plan, source, "again.onnx")
    assert Path("again.onnx").read_bytes() == Path("plain.onnx").read_bytes()
    rows = {row["what"]: row for row in behind.report["behind"]["rows"]}
    name = behind.report["behind"]["name"]
    assert name == f"{__name__}:same"
    assert list(rows) == ["as it is", "low rank", name, f"low rank, then {name}"]
    assert [row["loss"] for row in rows.values()][0::2] == [0, 0]
    both, alone = rows[f"low rank, then {name}"], rows["low rank"]
    assert both["loss"] == alone["loss"] == plain.report["metric"]["loss"] > 0
    assert both["bytes"] == alone["bytes"] == Path("plain.onnx").stat().st_size
    assert rows["as it is"]["bytes"] == source.stat().st_size
    assert plain.report["behind"] is None


def test_losses_count_against_the_original_without_the_step(source: Path) -> None:
    """Scaling by 1.03 loses 3% of the outputs by itself, and low rank comes on top of it."""
    before = Path(source).read_bytes()
    step = partial(scaled, by=1.03)
    result = onnxlr.optimize(source, "out.onnx", data="data.npz", behind=step, **HALF)
    assert source.read_bytes() == before  # the step wrote over a copy
    test = feeding_of(source).test
    assert test is not None
    x = X[test.index]
    y, small = output(source, x), output(Path("out.onnx"), x)
    spread = np.linalg.norm(y - y.mean(axis=0))
    losses = [float(np.linalg.norm(z - y) / spread) for z in (y, small, 1.03 * y, 1.03 * small)]
    rows = result.report["behind"]["rows"]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-3, abs=1e-6)
    assert result.report["metric"]["loss"] == pytest.approx(losses[3], rel=1e-3)
    original = next(p for p in result.report.frontier if not p.layers)
    assert original.loss == pytest.approx(losses[2], rel=0.2)  # on other samples


def test_speed_is_compared_with_what_would_be_used_otherwise(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[int, int]] = []
    unpatched = compare_sessions

    def nodes(session: Session) -> int:
        content = session.content
        model = onnx.load(content) if isinstance(content, str) else onnx.load_from_string(content)
        return sum(n.op_type == "Mul" for n in model.graph.node)

    def spying(a: Session, b: Session, *rest: Any) -> Any:
        pairs.append((nodes(a), nodes(b)))
        return unpatched(a, b, *rest)

    monkeypatch.setattr("onnxlr.plan.evaluate.compare_sessions", spying)
    options = HALF | {"measure": True, "target": None, "rank": "0.25"}
    step = partial(scaled, by=1.001)
    result = onnxlr.optimize(source, "out.onnx", data="data.npz", behind=step, **options)
    assert pairs
    assert set(pairs) == {(1, 1)}
    rows = result.report["behind"]["rows"]
    assert all(row["ms"] > 0 for row in rows)
    assert [row["speedup"] for row in rows] == pytest.approx(
        [rows[0]["ms"] / r["ms"] for r in rows]
    )


def test_a_step_that_low_rank_makes_worse_has_the_original_handed_over(source: Path) -> None:
    """With a chain in it the model is scaled by 1.5; the original stays as it is."""
    step = partial(scaled, by=1.5, from_products=3)
    options = HALF | {"target": None, "rank": "0.25"}
    result = onnxlr.optimize(source, "out.onnx", data="data.npz", behind=step, **options)
    assert Path("out.onnx").read_bytes() == source.read_bytes()
    assert result.report["metric"]["loss"] == 0
    assert all("put back: rel-error would rise to" in d.reason for d in result.plan.decisions)
    assert [row["what"] for row in result.report["behind"]["rows"]] == ["as it is", SCALED]
    assert "low rank gains nothing; a run without --behind" in result.report["behind"]["verdict"]
    plain = onnxlr.optimize(source, data="data.npz", **options)
    assert len(plain.plan.replaced) == 2


def test_a_step_that_is_outside_the_limit_by_itself_is_said_in_one_line(source: Path) -> None:
    step = partial(scaled, by=1.2)
    options = HALF | {"target": None, "behind_out": "behind.onnx"}
    result = onnxlr.optimize(source, "out.onnx", data="data.npz", behind=step, **options)
    assert Path("out.onnx").read_bytes() == source.read_bytes()
    assert output(Path("behind.onnx")) == pytest.approx(1.2 * output(source), rel=1e-5)
    assert 0.2 < result.report["metric"]["loss"] < 0.25  # of the file that would be used
    why = f"{SCALED} alone is outside the limit: rel-error would rise to 0.2"
    assert all(why in d.reason for d in result.plan.decisions)
    assert f"{SCALED} isn't within the limit: rel-error" in result.report["behind"]["verdict"]
    assert result.report["behind"]["verdict"].startswith("neither: ")
    with pytest.raises(BudgetError, match=why):
        onnxlr.optimize(source, data="data.npz", behind=step, **HALF)


def test_static_quantization_sees_samples_that_fit_and_no_others(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime.quantization as tools

    seen: list[Array] = []
    unpatched: Callable[..., None] = tools.quantize_static

    def spying(model: Any, out: Any, reader: Any, **rest: Any) -> None:
        following = reader.get_next

        def get_next() -> dict[str, Array] | None:
            feed: dict[str, Array] | None = following()
            seen.extend(() if feed is None else feed["x"])
            return feed

        reader.get_next = get_next
        unpatched(model, out, reader, **rest)

    monkeypatch.setattr(tools, "quantize_static", spying)
    options = HALF | {"target": None, "rank": "0.25", "max_drop": 1}
    result = onnxlr.optimize(source, data="data.npz", behind="int8-static", **options)
    feeding = feeding_of(source)
    assert feeding.fit is not None
    numbers = {int(np.flatnonzero((row == X).all(axis=1))[0]) for row in seen}
    assert len(numbers) == 64
    assert numbers <= set(feeding.fit.index.tolist())
    small = [row["bytes"] for row in result.report["behind"]["rows"]]
    assert small[3] < small[1] < small[0]


def test_the_command_tells_which_is_best(source: Path) -> None:
    words = ["--data", "data.npz", "--max-drop", "0.1", "--target", "params=0.4", "--no-measure"]
    files = ["--json", "r.json", "--report", "r.html", "--behind-out", "int8.onnx"]
    words += ["--behind", "int8-dynamic", "--metric", "rel-error", *files]
    done = CliRunner().invoke(main, ["optimize", source.name, "o.onnx", *words])
    assert done.exit_code == 0, done.output
    report = json.loads(Path("r.json").read_text(encoding="utf-8"))
    rows = report["behind"]["rows"]
    assert [row["what"] for row in rows] == [
        *("as it is", "low rank", "int8-dynamic", "low rank, then int8-dynamic")
    ]
    assert {row["ms"] for row in rows} == {None}
    verdict = report["behind"]["verdict"]
    assert verdict.startswith("both: low rank, then int8-dynamic is the smallest within 0.1 (")
    assert f"{rows[3]['bytes'] / rows[0]['bytes']:.0%} of the bytes" in verdict
    for text in (" ".join(done.output.split()), Path("r.html").read_text(encoding="utf-8")):
        assert verdict in text
        assert f"{rows[3]['bytes']:,}" in text
    assert "what int8-dynamic makes of the saved file" in report["verified"]
    assert report["output"]["bytes"] == Path("o.onnx").stat().st_size == rows[1]["bytes"]
    assert rows[3]["bytes"] == Path("int8.onnx").stat().st_size
    loss = onnxlr.compare(source, "int8.onnx", data="data.npz", metric="rel-error").quality.drop
    assert loss == pytest.approx(rows[3]["loss"], rel=0.3)  # on all of the samples
    assert {n.op_type for n in onnx.load("o.onnx").graph.node} == {"MatMul", "Relu", "Add"}


FUNCTIONS = """
import pathlib

def raising(path):
    print("a line that is no part of the output")
    raise RuntimeError("no such scale")

def text(path):
    other = pathlib.Path(path).with_name("other.txt")
    other.write_text("nothing")
    return other

def nothing(path):
    return None
"""


@pytest.fixture
def functions(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (here / "steps_of_mine.py").write_text(FUNCTIONS, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(here)
        yield


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["int4"], 2, "choose from int8-dynamic, int8-static, fp16 or module:function"),
        (["int8-static"], 2, "needs samples to calibrate on: name them with --data"),
        (["fp16", "--behind-out", "o.onnx"], 2, "o.onnx"),
        (["fp16", "--verify", "layers"], 2, "--behind needs a run"),
        (["steps_of_mine:missing"], 2, "can't be imported: module 'steps_of_mine' has no attrib"),
        (["steps_of_mine:raising"], 1, "failed on net.onnx: RuntimeError: no such scale"),
        (["steps_of_mine:nothing"], 1, "gave None for net.onnx: it must give the path"),
        (["steps_of_mine:text"], 1, "gave a file for net.onnx that can't be used: "),
    ],
)
def test_what_cannot_be_done_is_one_line(
    source: Path, words: list[str], code: int, said: str
) -> None:
    done = CliRunner().invoke(main, ["optimize", source.name, "o.onnx", "--behind", *words])
    assert done.exit_code == code, done.output
    lines = [line for line in done.stderr.splitlines() if "no part of the output" not in line]
    assert said in lines[-1]
    assert "Traceback" not in done.output
    assert "no part of the output" not in done.stdout
    assert not Path("o.onnx").exists()


def test_a_step_that_fails_on_a_candidate_costs_that_candidate(source: Path) -> None:
    def picky(path: str) -> str:
        names = {n.name for n in onnx.load(path).graph.node}
        if "first" not in names:
            raise RuntimeError("the first product is gone")
        return same(path)

    options = HALF | {"target": None, "rank": "0.25"}
    result = onnxlr.optimize(source, "out.onnx", data="data.npz", behind=picky, **options)
    decided = {d.name: d for d in result.plan.decisions}
    assert {name: d.decision for name, d in decided.items()} == {"first": "keep", "second": "svd"}
    assert "RuntimeError: the first product is gone" in decided["first"].reason
    with pytest.raises(BudgetError, match="the first product is gone"):
        onnxlr.optimize(source, data="data.npz", behind=picky, **HALF | {"target": "macs=0.2"})


def test_a_step_that_fails_on_every_candidate_costs_them_all(source: Path) -> None:
    def original_alone(path: str) -> str:
        if "onnxlr_plan" in {p.key for p in onnx.load(path).metadata_props}:
            raise RuntimeError("only what nobody touched")
        return same(path)

    options = HALF | {"target": None, "rank": "0.25"}
    result = onnxlr.optimize(source, "out.onnx", data="data.npz", behind=original_alone, **options)
    assert Path("out.onnx").read_bytes() == source.read_bytes()
    assert all("RuntimeError: only what nobody" in d.reason for d in result.plan.decisions)


def test_a_file_behind_that_the_runtime_refuses(source: Path) -> None:
    def unknown(path: str) -> str:
        model = onnx.load(path)
        model.graph.node[1].domain = "nobody.knows"
        model.opset_import.append(onnx.helper.make_opsetid("nobody.knows", 1))
        onnx.save(model, path)
        return path

    with pytest.raises(ModelError, match=r"can't open .*net.onnx after .*unknown"):
        onnxlr.optimize(source, data="data.npz", behind=unknown, **HALF)
    with pytest.raises(UsageError, match="--behind-out a needs a step that makes it"):
        onnxlr.optimize(source, behind_out="a")
    with pytest.raises(UsageError, match="--behind 3 is unknown"):
        onnxlr.optimize(source, behind=3)  # type: ignore[arg-type]
