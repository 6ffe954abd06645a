"""Widths of attention heads: as many channels of each head stay as of the others."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.testing import assert_allclose

import onnxlr
from onnxlr.decompose.interpolative import Reading, elimination
from onnxlr.decompose.ranks import parse_rank
from onnxlr.errors import UsageError
from tests.support.builders import Array, make_model, node, relative, run
from tests.support.narrowing import narrowing_case

HEADS, EACH, ROWS = 3, 8, 10
SIZE = HEADS * EACH
# Two channels of each head are of no use, each for a reason of its own and at another place.
DEAD = {0: 3, 1: 0, 2: 7}  # nobody reads them
COPIES = {0: (5, 1), 1: (2, 6), 2: (4, 3)}  # channel of a head, and the one that it repeats


def attention(*, dynamic: bool, merged: bool = False, seed: int = 0) -> onnx.ModelProto:
    """Self-attention whose query and value have three heads; shapes are constants, or computed.

    Where they are computed, queries and values are given theirs by one list. With ``merged``, the
    heads become one axis with the batch for the products, as in many exports.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {
        f"w{key}": rng.standard_normal((SIZE, SIZE)).astype(np.float32) / SIZE**0.5 for key in "qkv"
    }
    weights["wo"] = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    weights["bv"] = rng.standard_normal(SIZE).astype(np.float32)
    weights["bo"] = rng.standard_normal(SIZE).astype(np.float32)
    for head in range(HEADS):
        first = head * EACH
        weights["wo"][first + DEAD[head]] = 0
        copy, origin = COPIES[head]
        for name in ("wv", "bv"):
            weights[name][..., first + copy] = weights[name][..., first + origin]
    batch = 1 if merged else 2
    nodes = [
        *(node("MatMul", ["x", f"w{key}"], key, key) for key in "qk"),
        node("MatMul", ["x", "wv"], "v0", "v"),
        node("Add", ["v0", "bv"], "v"),
    ]
    shape, back = [batch, ROWS, HEADS, EACH], [batch, ROWS, SIZE]
    if dynamic:
        for i in range(2):
            weights[f"at{i}"] = np.array([i])
            nodes.append(node("Gather", ["sizes", f"at{i}"], f"size{i}"))
        nodes.insert(0, node("Shape", ["x"], "sizes"))
        weights |= {"heads": np.array([HEADS]), "each": np.array([EACH]), "all": np.array([SIZE])}
        nodes.append(node("Concat", ["size0", "size1", "heads", "each"], "shape", axis=0))
        nodes.append(node("Concat", ["size0", "size1", "all"], "back", axis=0))
    else:
        weights |= {"shape": np.array(shape), "back": np.array(back)}
    for key, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes.append(node("Reshape", [key, "shape"], f"{key}r"))
        nodes.append(node("Transpose", [f"{key}r"], f"{key}t", perm=order))
    values = "vt"
    if merged:
        weights["flat"] = np.array([-1, ROWS, EACH])
        weights["apart"] = np.array([1, HEADS, ROWS, EACH])
        nodes.append(node("Reshape", ["vt", "flat"], "vf"))
        values = "vf"
    nodes += [
        node("MatMul", ["qt", "kt"], "scores"),
        node("Softmax", ["scores"], "shares", axis=-1),
    ]
    if merged:
        weights["square"] = np.array([HEADS, ROWS, ROWS])
        nodes.append(node("Reshape", ["shares", "square"], "sharesf"))
        nodes.append(node("MatMul", ["sharesf", values], "mixedf"))
        nodes.append(node("Reshape", ["mixedf", "apart"], "mixed"))
    else:
        nodes.append(node("MatMul", ["shares", values], "mixed"))
    nodes += [
        node("Transpose", ["mixed"], "mt", perm=[0, 2, 1, 3]),
        node("Reshape", ["mt", "back"], "together"),
        node("MatMul", ["together", "wo"], "o", "o"),
        node("Add", ["o", "bo"], "y"),
    ]
    # What is computed from fixed axes alone is a constant in disguise.
    samples = "n" if dynamic and not merged else batch
    return make_model(nodes, {"x": (samples, ROWS, SIZE)}, ["y"], weights)


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["constant", "computed"])
def test_useless_channels_of_each_head_go(dynamic: bool, merged: bool, tmp_path: Path) -> None:
    model = attention(dynamic=dynamic, merged=merged)
    case = narrowing_case(model, tmp_path, samples=64)
    rows = {row.name: row for row in case.widths.rows}
    assert rows["v"].refusal is None
    assert (rows["v"].size, rows["v"].heads, rows["v"].readers) == (SIZE, HEADS, ("o",))
    assert "multiplies it with other channels" in str(rows["q"].refusal)
    assert "multiplies it with other channels" in str(rows["k"].refusal)
    small, counts = case.without_redundant()
    assert counts == {"v": SIZE - 2 * HEADS}
    (before,), (after,) = run(model, {"x": case.x}), run(small, {"x": case.x})
    assert relative(before, after) < 1e-5
    stored = {t.name: list(t.dims) for t in small.graph.initializer}
    assert stored["wv"] == [SIZE, SIZE - 2 * HEADS]
    assert stored["wq"] == [SIZE, SIZE]
    # Queries keep the list of sizes that values shared with them.
    lists = [[n.op_type for n in m.graph.node].count("Concat") for m in (model, small)]
    assert lists == ([0, 0] if not dynamic else [2, 0] if merged else [2, 3])


@pytest.mark.parametrize("count", [HEADS, 4 * HEADS, SIZE - HEADS])
def test_every_number_of_channels_leaves_a_model_that_runs(count: int, tmp_path: Path) -> None:
    model = attention(dynamic=True)
    case = narrowing_case(model, tmp_path, exact=False, samples=256)
    offer = case.offers[0]
    kept = offer.elimination.kept(count)
    assert np.bincount(kept * HEADS // SIZE).tolist() == [count // HEADS] * HEADS
    small = case.narrow({"v": count})
    x = np.load(tmp_path / "x.npy")
    (before,), (after,) = run(model, {"x": x}), run(small, {"x": x})
    # What is predicted is of what the reader makes of it, about its mean.
    mean = before.mean(axis=(0, 1))
    assert_allclose(relative(before - mean, after - mean), offer.error(count), rtol=0.02, atol=1e-5)


def test_heads_that_have_nothing_in_common_go_as_each_would_alone() -> None:
    rng = np.random.default_rng(5)
    blocks, weights = [], []
    for _ in range(HEADS):
        x = rng.standard_normal((40, EACH)) @ rng.standard_normal((EACH, EACH))
        blocks.append(x.T @ x / len(x))
        weights.append(rng.standard_normal((6, EACH)))
    moments = np.zeros((SIZE, SIZE))
    for i, block in enumerate(blocks):
        moments[i * EACH : (i + 1) * EACH, i * EACH : (i + 1) * EACH] = block
    found = elimination([Reading(moments, np.concatenate(weights, axis=1))], HEADS)
    order = found.order[: SIZE - HEADS]
    for i, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
        alone = elimination([Reading(block, weight)]).order[: EACH - 1]
        assert (order[order // EACH == i] % EACH).tolist() == alone.tolist()
    rounds = np.sort(order.reshape(-1, HEADS) // EACH, axis=1)
    assert (rounds == np.arange(HEADS)).all()


@pytest.mark.parametrize(
    ("rank", "stay"), [("10", 12), ("12", 12), ("0.3", 9), ("energy:0.999", 18), ("99", SIZE)]
)
def test_named_ranks_keep_as_many_of_each_head(rank: str, stay: int, tmp_path: Path) -> None:
    case = narrowing_case(attention(dynamic=False), tmp_path)
    (offer,) = case.offers
    assert offer.named(parse_rank(rank)) == stay
    for gridded in (False, True):
        counts = offer.counts(gridded=gridded)
        assert counts == sorted({c for c in counts if c % HEADS == 0}, reverse=True)
        assert counts[0] < SIZE


def test_a_run_narrows_heads_and_its_plan_says_so(tmp_path: Path) -> None:
    model = attention(dynamic=True)
    onnx.save(model, tmp_path / "in.onnx")
    x = np.random.default_rng(2).standard_normal((400, ROWS, SIZE)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    result = onnxlr.optimize(
        tmp_path / "in.onnx",
        tmp_path / "out.onnx",
        data=tmp_path / "x.npz",
        method="interpolative",
        rank="exact",
        plan_out=tmp_path / "plan.json",
        jobs=1,
    )
    (row,) = [w for w in result.report.to_dict()["widths"] if w["name"] == "v"]
    assert row["decision"] == "interpolative"
    assert len(row["kept"]) == SIZE - 2 * HEADS
    plan = json.loads((tmp_path / "plan.json").read_text())
    onnxlr.apply(tmp_path / "plan.json", tmp_path / "in.onnx", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    width = next(w for w in plan["widths"]["rows"] if w["name"] == "v")
    width["kept"] = list(range(SIZE - 2 * HEADS))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match="more channels of some of the 3 heads of 'v' than of"):
        onnxlr.apply(tmp_path / "plan.json", tmp_path / "in.onnx", tmp_path / "never.onnx")
    assert not (tmp_path / "never.onnx").exists()


@pytest.mark.parametrize("groups", [2, 4])
def test_shuffled_channels_go_with_those_in_their_place_in_other_groups(
    groups: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    count, each = 16, 16 // groups
    weights = {
        "a": rng.standard_normal((count, 4, 3, 3)).astype(np.float32),
        "b": rng.standard_normal((5, count, 1, 1)).astype(np.float32),
        "apart": np.array([2, groups, each, 6, 6]),
        "back": np.array([2, count, 6, 6]),
    }
    # Behind the shuffle they come in turn: the third of every group, side by side.
    weights["b"][:, 2 * groups : 3 * groups] = 0
    nodes = [
        node("Conv", ["x", "a"], "h", "first"),
        node("Reshape", ["h", "apart"], "r"),
        node("Transpose", ["r"], "t", perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["t", "back"], "s"),
        node("Conv", ["s", "b"], "y", "second"),
    ]
    model = make_model(nodes, {"x": (2, 4, 8, 8)}, ["y"], weights)
    case = narrowing_case(model, tmp_path)
    assert [(w.size, w.heads, w.refusal) for w in case.widths.rows][:1] == [(each, 1, None)]
    small, counts = case.without_redundant()
    assert counts == {"first": each - 1}
    assert relative(run(model, {"x": case.x})[0], run(small, {"x": case.x})[0]) < 1e-5
    assert {t.name: t.dims[0] for t in small.graph.initializer}["a"] == count - groups


def test_heads_that_are_mixed_stay(tmp_path: Path) -> None:
    """A softmax over the channels of each head needs them all."""
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.standard_normal((4, SIZE)).astype(np.float32),
        "b": rng.standard_normal((SIZE, 4)).astype(np.float32),
        "apart": np.array([2, HEADS, EACH]),
        "back": np.array([2, SIZE]),
    }
    nodes = [
        node("MatMul", ["x", "a"], "h", "first"),
        node("Reshape", ["h", "apart"], "r"),
        node("Softmax", ["r"], "s", "soft", axis=-1),
        node("Reshape", ["s", "back"], "t"),
        node("MatMul", ["t", "b"], "y", "second"),
    ]
    model = make_model(nodes, {"x": (2, 4)}, ["y"], weights)
    case = narrowing_case(model, tmp_path)
    assert case.widths.rows[0].refusal == "read by Softmax 'soft', which may mix it"
