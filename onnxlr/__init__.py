"""Low-rank factorization of ONNX models: smaller, measurably faster, as accurate as you ask."""

import importlib

from onnxlr.version import __version__

TYPE_CHECKING = False  # typing's own takes a while to import
if TYPE_CHECKING:
    from onnxlr.api import apply, bench, compare, inspect, optimize
    from onnxlr.errors import (
        BudgetError,
        ClusterError,
        DataError,
        ModelError,
        OnnxlrError,
        OutputError,
        RuntimeMissingError,
        UsageError,
    )
    from onnxlr.pipeline import Result

__all__ = [
    "BudgetError",
    "ClusterError",
    "DataError",
    "ModelError",
    "OnnxlrError",
    "OutputError",
    "Result",
    "RuntimeMissingError",
    "UsageError",
    "__version__",
    "apply",
    "bench",
    "compare",
    "inspect",
    "optimize",
]


def __getattr__(name: str) -> object:
    """What takes a second to import is imported when it is asked for.

    Before that the command can hear Ctrl-C, which no import should.
    """
    if name in __all__:
        for home in ("errors", "api"):
            found = vars(importlib.import_module(f"onnxlr.{home}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
