"""Exports by torch that don't read the sources of all its operators anew each time."""

from functools import cache

import pytest

pytest.importorskip("torch")


@cache
def share_operators() -> None:
    """Have this process build torch's table of ONNX operators once; it takes as long as an export.

    Versions of torch that keep it elsewhere build it for every export.
    """
    try:
        from torch.onnx._internal.exporter import _registration

        table = _registration.ONNXRegistry
        table.from_torchlib = staticmethod(cache(table.from_torchlib))
    except (ImportError, AttributeError):
        return
