"""Layers named by --include and --exclude."""

import re
from collections.abc import Callable

from onnxlr.errors import UsageError
from onnxlr.layers.layer import Layer


def name_filter(include: str | None, exclude: str | None) -> Callable[[Layer], str | None]:
    """A function that says why ``--include`` and ``--exclude`` leave a layer out; None if not.

    The expressions are searched in the layer's, its weight's and its users' names.

    Raises
    ------
    UsageError
        If one is no regular expression.
    """
    try:
        wanted = re.compile(include) if include else None
        unwanted = re.compile(exclude) if exclude else None
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--include/--exclude: not a regular expression: {error}") from None

    def excluded(layer: Layer) -> str | None:
        names = [layer.name, layer.weight.name or "", *(u.node.name or "" for u in layer.uses)]
        if wanted is not None and not any(wanted.search(n) for n in names):
            return f"not named by --include {include}"
        if unwanted is not None and any(unwanted.search(n) for n in names):
            return f"named by --exclude {exclude}"
        return None

    return excluded
