"""Tests of onnxlr.system."""
