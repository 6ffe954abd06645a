"""Processes, files, memory, sessions of ONNX Runtime and the cache.

Nothing here knows of ONNX graphs or of low rank: it imports only errors and version.
"""
