"""How long-running work reports its progress, without depending on who shows it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A display of progress. The command line shows bars; the library shows nothing by default."""

    def stage(
        self, description: str, total: int | None
    ) -> AbstractContextManager[Callable[[str], None]]:
        """Begin a stage of ``total`` steps (None if unknown).

        Returns
        -------
        A context that lasts as long as the stage; it gives a function to be called after each
        step, with a word on it.
        """

    def tell(self, line: str) -> None:
        """Say a line that stays when the work is done."""


class Silent:
    """A display that shows nothing."""

    @contextmanager
    def stage(
        self,
        description: str,  # noqa: ARG002
        total: int | None,  # noqa: ARG002
    ) -> Iterator[Callable[[str], None]]:
        """Begin a stage; its steps are ignored."""
        yield lambda _: None

    def tell(self, line: str) -> None:
        """Say nothing."""
