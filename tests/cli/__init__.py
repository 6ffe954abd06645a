"""Tests of onnxlr.cli."""
