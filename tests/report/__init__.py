"""Tests of onnxlr.report."""
