"""Runs that take a blink, since no test asserts a time, with a cache folder that nobody shares."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from onnxlr.limits import Limits
from onnxlr.system.deadline import TRIAL_VARIABLE

# Fewer candidates and sets too: what is tested is how they are chosen.
SHORT = Limits(
    timing_seconds=0.05,
    timing_seconds_least=0.0,
    layer_seconds=0.02,
    timing_rows=9,
    ranks=4,
    refined_sets=8,
    narrow_trials=3,
    narrow_corrections=1,
)

# Fewer still, for models that are no toys: what is tested is that every stage runs on them.
FEW = replace(
    SHORT,
    trials_least=2,
    trials=2,
    trials_most=2,
    rungs=2,
    rungs_joined=3,
    bolder_levels=0,
    corrected_rungs=0,
    sequence_samples=0,
    narrow_trials=2,
    narrow_corrections=0,
    in_place_rounds=0,
    in_place_seconds=0.2,
)


def code_of(limits: Limits) -> str:
    """Statements that have these limits in another Python process, before its first run."""
    home = "onnxlr.api.functions"
    return f"import {home}; from onnxlr.limits import Limits; {home}.LIMITS = {limits}"


@contextmanager
def short_runs(cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """Make runs short, cached in this folder, without trials and with one process.

    Fixtures that several tests share enter it themselves: those of a single test come later.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxlr.api.functions.LIMITS", SHORT)
        patch.setenv("ONNXLR_CACHE", str(cache))
        patch.setenv(TRIAL_VARIABLE, "off")  # no process tries the models of the tests first
        patch.setattr("onnxlr.system.pool.usable_cores", lambda: 1)  # and none is started to help
        yield patch
