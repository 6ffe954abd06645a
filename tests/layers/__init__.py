"""Tests of onnxlr.layers."""
