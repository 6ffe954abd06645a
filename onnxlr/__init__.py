"""Low-rank factorization of ONNX models: smaller, measurably faster, as accurate as you ask."""

import importlib

from onnxlr.version import __version__

TYPE_CHECKING = False  # importing that of typing takes a while
if TYPE_CHECKING:
    from onnxlr.api.functions import apply, inspect, optimize
    from onnxlr.api.measure import bench, compare
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
    from onnxlr.jobs.pipeline import Result

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
    """Import a public name when it is first used: all of them take a second to import.

    The command imports this package too, and ends itself at Ctrl-C from early on.
    """
    if name in __all__:
        for home in ("errors", "api.functions", "api.measure"):
            names = vars(importlib.import_module(f"onnxlr.{home}"))
            if name in names:
                return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
