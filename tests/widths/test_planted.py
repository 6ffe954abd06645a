"""Redundant channels are found behind every carrier, and go without a trace."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.builders import relative, run
from tests.support.narrowing import narrowing_case
from tests.support.planted import CARRIERS, CHANNELS, GOES, planted

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
    # The dead channel of a carrier that sums up stays alive there.
    last = [count for count in counts.values() if count == CHANNELS - GOES]
    assert last, counts
    assert case.widths.usable
    assert small.ByteSize() < model.ByteSize()


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**16),
    carriers=st.lists(st.sampled_from(sorted(CARRIERS)), min_size=1, max_size=4),
    kernel=st.sampled_from([1, 3]),
)
def test_chains_of_carriers(seed: int, carriers: list[str], kernel: int, tmp_path: Path) -> None:
    # What changes the other axes comes last, where nothing of the old size is added.
    carriers = sorted(carriers, key=lambda c: c in ("pool", "deconvolved"))
    model = planted(seed, carriers, kernel)
    case = narrowing_case(model, tmp_path)
    small, counts = case.without_redundant()
    (before,), (after,) = run(model, {"x": case.x}), run(small, {"x": case.x})
    assert relative(before, after) < _EXACT
    assert min(counts.values()) <= CHANNELS - GOES
    full = case.narrow({row.name: row.size for row in case.widths.rows})
    assert relative(before, run(full, {"x": case.x})[0]) == 0
