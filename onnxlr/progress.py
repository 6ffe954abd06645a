"""How long work tells how far it is, without knowing who listens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A listener. The command line shows bars; the library is silent by default."""

    def stage(
        self, description: str, total: int | None
    ) -> AbstractContextManager[Callable[[str], None]]:
        """Enter a stage of ``total`` steps (None if unknown); call what it gives after each."""


class Silent:
    """Tells nobody."""

    @contextmanager
    def stage(
        self,
        description: str,  # noqa: ARG002
        total: int | None,  # noqa: ARG002
    ) -> Iterator[Callable[[str], None]]:
        """A stage nobody hears of."""
        yield lambda _: None
