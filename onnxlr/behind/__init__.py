"""Steps that follow onnxlr (``--behind``): quantization and float16 by ONNX Runtime, or a function.

It imports system and errors.
"""
