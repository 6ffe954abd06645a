"""Tests of what is done behind onnxlr."""
