"""Tables are fitted to how often their entries are looked up."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxlr.calibrate.kept import read_statistics, write_statistics
from onnxlr.candidates.fitting import (
    THOROUGH,
    closed_errors,
    fit_layer,
    fit_to_inputs,
    lookup_shares,
    output_error,
    rest_of,
)
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import choose_passes
from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.rewrite.replace import rewrite
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.session import Feed
from tests.support.builders import Array, make_model, node
from tests.support.calibration import calibrated, outputs
from tests.support.pass_cases import gather, rand

(EMBEDDING,) = choose_passes(("embedding-svd",))
ENTRIES = 30


def often(count: int, seed: int) -> list[Feed]:
    """Lookups of which most are of a few entries; some count from the end."""
    rng = np.random.default_rng(seed)
    shares = 0.7 ** np.arange(ENTRIES) + 0.002
    feeds: list[Feed] = []
    for _ in range(count):
        entries = rng.choice(ENTRIES, 16, p=shares / shares.sum())
        feeds.append({"x": np.where(rng.random(16) < 0.3, entries - ENTRIES, entries).astype("f4")})
    return feeds


def looked_up(model: onnx.ModelProto, feeds: list[Feed]) -> tuple[Prepared, Layer]:
    prepared = prepare(load(model), feed=feeds[0])
    (layer,) = prepared.layers
    return prepared, layer


@pytest.mark.parametrize(
    ("table", "axis"), [((ENTRIES, 12), 0), ((12, ENTRIES), 1), ((3, ENTRIES, 4), -2)]
)
def test_what_is_looked_up_often_loses_less(table: tuple[int, ...], axis: int) -> None:
    """On other lookups of the same kind than the table's own SVD, and as much as is told."""
    model = gather((16,), table, axis=axis)
    feeds, held = often(60, 0), often(200, 1)
    prepared, layer = looked_up(model, feeds)
    statistics = calibrated(prepared, [layer], feeds)[layer.name]
    errors = closed_errors(EMBEDDING, layer, statistics)
    assert errors is not None
    for rank in (2, 4):
        choice = Choice(EMBEDDING, (rank,))
        lost = []
        for basis in (None, statistics):
            factored = fit_layer(prepared, layer.name, choice, basis)
            assert factored.shift is None
            written = to_proto(
                rewrite(
                    prepared.model, prepared.shapes, {layer.name: choice}, {layer.name: factored}
                )
            )
            onnx.checker.check_model(written, full_check=True)
            wanted, got = (np.stack(outputs(m, held)) for m in (model, written))
            lost.append(float(np.linalg.norm(wanted - got) / np.linalg.norm(wanted)))
        assert lost[1] < 0.9 * lost[0]
        assert errors[rank] == pytest.approx(lost[1], rel=0.1)
        rest = rest_of(EMBEDDING, layer, (rank,), factored.factors)
        assert output_error(layer, rest, statistics) == pytest.approx(errors[rank], rel=1e-4)


def test_the_optimum_is_that_of_weighted_entries() -> None:
    """Beside an oracle: the SVD of the table with each entry times the root of its share."""
    feeds = often(100, 0)  # in shards
    prepared, layer = looked_up(gather((16,), (ENTRIES, 12)), feeds)
    statistics = calibrated(prepared, [layer], feeds)[layer.name]
    entries = np.concatenate([feed["x"] for feed in feeds]).astype(int) % ENTRIES
    counts = np.bincount(entries, minlength=ENTRIES)
    assert statistics.lookups is not None
    np.testing.assert_array_equal(statistics.lookups, counts)
    table = layer.array().astype(np.float64)
    once = max(1, int(np.sum(counts == 1))) / counts.sum()
    shares = (1 - once) * counts / counts.sum() + once / ENTRIES
    weighted = np.sqrt(shares)[:, None] * table
    values = np.linalg.svd(weighted, compute_uv=False)
    errors = closed_errors(EMBEDDING, layer, statistics)
    assert errors is not None
    for rank in range(1, 13):
        best = np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))
        assert errors[rank] == pytest.approx(best, abs=1e-7)
        p, q = fit_to_inputs(EMBEDDING, layer, (rank,), statistics, THOROUGH)
        apart = np.sqrt(shares)[:, None] * (table - p @ q)
        assert np.linalg.norm(apart) / np.linalg.norm(weighted) == pytest.approx(best, abs=1e-6)


def test_shares_of_entries() -> None:
    """Those that weren't seen have together what those have that were seen once."""
    shares = lookup_shares(np.array([6, 1, 1, 0]))
    assert shares.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(shares, np.array([6, 1, 1, 0]) / 8 * 0.75 + 0.25 / 4)
    np.testing.assert_allclose(lookup_shares(np.zeros(5, np.int64)), 0.2)


def test_constant_indices_are_seen() -> None:
    """Positions, say, which no feed names."""
    model = make_model(
        [node("Gather", ["w", "i"], "p", "positions"), node("Add", ["p", "x"], "y")],
        {"x": (4, 6)},
        ["y"],
        {"w": rand(11, 6), "i": np.array([3, 0, 3, 5])},
    )
    feeds: list[Feed] = [{"x": rand(4, 6)}] * 3
    prepared, layer = looked_up(model, feeds)
    lookups = calibrated(prepared, [layer], feeds)[layer.name].lookups
    assert lookups is not None
    assert lookups.tolist() == [3, 0, 0, 6, 0, 3, 0, 0, 0, 0, 0]


def test_the_cache_keeps_lookups(tmp_path: Path) -> None:
    feeds = often(5, 0)
    prepared, layer = looked_up(gather((16,), (ENTRIES, 12)), feeds)
    item = calibrated(prepared, [layer], feeds)[layer.name]
    cache, key = Cache(tmp_path), key_of("k")
    write_statistics(cache, key, {layer.name: item}, seconds=1.0)
    again = read_statistics(cache, key, [layer])[layer.name]
    assert item.lookups is not None
    assert again.lookups is not None
    np.testing.assert_array_equal(again.lookups, item.lookups)
    assert again.rows == item.rows == 80
    arrays: dict[str, Array] = cache.read_arrays("statistics", key)
    cache.write_arrays("statistics", key, {**arrays, f"lookups {layer.name}": np.ones(ENTRIES)})
    assert read_statistics(cache, key, [layer]) == {}
