"""What every test gets: short runs, and a cache folder in which no other test left anything."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from onnxlr.system.deadline import TRIAL_VARIABLE
from tests.support.limits import short_runs

_NUMBERS = count()
_SHIPPED = Path(__file__).parent.parent / "models" / "fashion-samples.npz"


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


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 600 of the samples that ship, for runs of the models that ship."""
    path = tmp_path_factory.mktemp("few-images") / "samples.npz"
    with np.load(_SHIPPED) as samples:
        np.savez(path, image=samples["image"][:600], label=samples["label"][:600])
    return path
