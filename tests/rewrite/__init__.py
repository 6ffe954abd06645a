"""Tests of onnxlr.rewrite."""
