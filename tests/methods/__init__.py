"""Tests of onnxlr.methods and of every built-in method."""
