"""Redundant channels are found behind every carrier, and go without a trace."""

from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.builders import relative, run
from tests.support.narrowing import narrowing_case
from tests.support.planted import CARRIERS, CHANNELS, GOES, HEADS, Plant, planted

_EXACT = 1e-5


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_copies_and_dead_channels_go_exactly(carrier: str, kernel: int, tmp_path: Path) -> None:
    model = planted(0, [carrier], kernel)
    case = narrowing_case(model, tmp_path)
    small, counts = case.without_redundant()
    (before,), (after,) = run(model, {"x": case.x}), run(small, {"x": case.x})
    assert relative(before, after) < _EXACT
    assert len(small.graph.node) == len(model.graph.node)
    goes = HEADS if carrier == "heads" else GOES
    whole = [o.width.name for o in case.offers if o.width.size == CHANNELS]
    assert {counts[name] for name in whole} == {CHANNELS - goes}
    assert case.widths.usable
    assert small.ByteSize() < model.ByteSize()


@pytest.mark.parametrize("looked_at", [False, True])
@pytest.mark.parametrize(
    "reader",
    [
        ("LSTM", "forward"),
        ("LSTM", "bidirectional"),
        ("GRU", "reverse"),
        ("RNN", "forward"),
        ("Attention",),
    ],
    ids=" ".join,
)
def test_operators_that_do_more_read_what_is_left(
    reader: tuple[str, ...], looked_at: bool, tmp_path: Path
) -> None:
    """Recurrent operators, and Attention; the channels that stay are fitted to their inputs too."""
    plant = Plant(3)
    x = plant.op("Tanh", plant.writer("x", 4))
    model = plant.model(
        plant.attention(x) if reader == ("Attention",) else plant.recurrent(x, *reader)
    )
    (output,) = model.graph.output
    if reader == ("Attention",):  # no shapes are inferred of ONNX Runtime's operators
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, 1, [2, 64, 8]))
    case = narrowing_case(model, tmp_path, exact=not looked_at, samples=256)
    assert [w.refusal for w in case.widths.rows] == [None]
    assert bool(case.narrower.statistics) == looked_at
    small = case.narrow({case.widths.rows[0].name: CHANNELS - GOES})
    (before,), (after,) = run(model, {"x": case.x}), run(small, {"x": case.x})
    assert relative(before, after) < (1e-3 if looked_at else _EXACT)
    assert small.ByteSize() < model.ByteSize()


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**16),
    carriers=st.lists(st.sampled_from(sorted(CARRIERS)), min_size=1, max_size=4),
    kernel=st.sampled_from([1, 3]),
)
def test_chains_of_carriers(seed: int, carriers: list[str], kernel: int, tmp_path: Path) -> None:
    # What changes the other axes comes last, where nothing of the old size is added.
    carriers = sorted(carriers, key=lambda c: c in ("pool", "deconvolved", "more positions"))
    model = planted(seed, carriers, kernel)
    case = narrowing_case(model, tmp_path)
    small, counts = case.without_redundant()
    (before,), (after,) = run(model, {"x": case.x}), run(small, {"x": case.x})
    assert relative(before, after) < _EXACT
    assert min(counts.values()) <= CHANNELS - (HEADS if "heads" in carriers else GOES)
    full = case.narrow({row.name: row.size for row in case.widths.rows})
    assert relative(before, run(full, {"x": case.x})[0]) == 0
