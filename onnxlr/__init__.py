"""Low-rank factorization of ONNX models: smaller, measurably faster, as accurate as you ask."""

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
from onnxlr.optimizer import Result

__version__ = "0.1.0"

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
