"""The layers that --include and --exclude leave out."""

import re
from collections.abc import Callable

from onnxlr.errors import UsageError
from onnxlr.layers.layer import Layer


def name_filter(include: str | None, exclude: str | None) -> Callable[[Layer], str | None]:
    """A function that returns why ``--include`` and ``--exclude`` leave a layer out, else None.

    The regular expressions may match the name of the layer, of its weight or of a user.

    Raises
    ------
    UsageError
        If one of them is no regular expression.
    """
    try:
        included = re.compile(include) if include else None
        excluded = re.compile(exclude) if exclude else None
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--include/--exclude: not a regular expression: {error}") from None

    def reason(layer: Layer) -> str | None:
        names = [layer.name, layer.weight.name or "", *(u.node.name or "" for u in layer.uses)]
        if included is not None and not any(included.search(n) for n in names):
            return f"not named by --include {include}"
        if excluded is not None and any(excluded.search(n) for n in names):
            return f"named by --exclude {exclude}"
        return None

    return reason
