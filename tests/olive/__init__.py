"""Tests of onnxlr.olive."""
