"""ONNX files read, checked and written, and graphs edited.

It imports system, errors and version.
"""

import logging

# onnx-ir logs what it finds wrong with a broken model; the error says that, and once is enough.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
