"""The tests of single operators that the ``onnx`` package brings."""

import warnings
from functools import cache
from typing import Any
from unittest import mock


@cache
def node_tests() -> tuple[Any, ...]:
    """The standard's tests of single operators: each has ``name``, ``model`` and ``data_sets``."""
    from onnx.backend.test.case.node import collect_testcases

    # Their source code, which the package reads for its documentation, isn't needed.
    no_source = mock.patch(
        "onnx.backend.test.case.base.process_snippet", lambda _, name, __: (name, "")
    )
    with no_source, warnings.catch_warnings():  # what they compute overflows on purpose
        warnings.simplefilter("ignore")
        return tuple(collect_testcases(None))
