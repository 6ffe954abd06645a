"""What is done to a file behind onnxlr: ready-made steps on ONNX Runtime's tools, or the user's.

It imports system and errors.
"""
