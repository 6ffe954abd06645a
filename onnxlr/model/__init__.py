"""ONNX files read, checked and written, and graphs edited.

It imports system, errors and version.
"""
