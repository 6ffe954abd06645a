"""What every test gets: short runs, and a cache folder in which no other test left anything."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from onnxlr.system.deadline import TRIAL_VARIABLE
from tests.support.limits import short_runs

_NUMBERS = count()


@pytest.fixture(autouse=True)
def _short_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # mktemp() looks through all folders of earlier tests for a number that is free.
    with short_runs(tmp_path_factory.getbasetemp() / f"cache-{next(_NUMBERS)}"):
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the test, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are tried in a process of their own first, as they are for users."""
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
