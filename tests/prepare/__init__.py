"""Tests of onnxlr.prepare."""
