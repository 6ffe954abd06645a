"""Tests of onnxlr.plan."""
