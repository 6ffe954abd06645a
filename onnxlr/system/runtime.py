"""The installed ONNX Runtime: imported when it is needed, and what it says on one line."""

import importlib.util
import re
from typing import Any

from onnxlr.errors import RuntimeMissingError, one_line

# A file and line of ONNX Runtime's source in a message, and the signature of the function there.
_SOURCE_LINE = re.compile(r"/\S+\.(?:cc|cpp|h):\d+ .*?\)\S* (?:\[with .*?\] )?")
LOG_ERROR = 3
LOG_FATAL = 4  # failures arrive as exceptions, so that printing them too would say them twice


def import_runtime() -> Any:
    """The module ``onnxruntime``.

    Raises
    ------
    RuntimeMissingError
        If none is installed, or it can't be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if importlib.util.find_spec("onnxruntime") is not None:
            raise RuntimeMissingError(
                f"ONNX Runtime is installed but can't be imported: {one_line(error)}"
            ) from None
        raise RuntimeMissingError(
            "ONNX Runtime isn't installed: pip install 'onnxlr[cpu]', or 'onnxlr[cuda]' for a GPU"
        ) from None
    onnxruntime.set_default_logger_severity(LOG_FATAL)
    return onnxruntime


def runtime_version() -> str:
    """The version of the installed ONNX Runtime.

    Raises
    ------
    RuntimeMissingError
        If none is installed.
    """
    return str(import_runtime().__version__)


def runtime_reason(error: object) -> str:
    """ONNX Runtime's message on one line, without error class, error code and source location."""
    text = one_line(_SOURCE_LINE.sub("", str(error)))
    parts = text.split(" : ", 3)
    return parts[3] if text.startswith("[ONNXRuntimeError]") and len(parts) == 4 else text
