"""Low-rank factorization of ONNX models: smaller, measurably faster, within the accuracy you allow."""

from onnxlr.api import Result, apply, bench, compare, inspect, optimize
from onnxlr.errors import (
    DataError,
    ModelError,
    OnnxlrError,
    OutputError,
    RuntimeMissingError,
    UsageError,
)

__version__ = "0.1.0"

__all__ = [
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
