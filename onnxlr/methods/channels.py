"""The method that takes channels away: it acts on widths between layers, and adds no node."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelMethod:
    """What is said of a method that isn't a pass."""

    name: str
    replaces: str
    summary: str
    paper: str


INTERPOLATIVE = ChannelMethod(
    "interpolative",
    "widths",
    "fewer channels between layers, no added node",
    "Cheng et al. 2005",
)


def names_channels(methods: Sequence[str]) -> bool:
    """Whether the methods that were asked for name this one."""
    return INTERPOLATIVE.name in methods
