"""What every test gets: short runs, and a cache folder in which no other test left anything."""

from collections.abc import Iterator
from itertools import count

import pytest

from tests.support.limits import short_runs

_NUMBERS = count()


@pytest.fixture(autouse=True)
def _short_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # mktemp() looks through all folders of earlier tests for a number that is free.
    with short_runs(tmp_path_factory.getbasetemp() / f"cache-{next(_NUMBERS)}"):
        yield
