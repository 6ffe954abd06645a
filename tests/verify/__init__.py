"""Tests of onnxlr.verify."""
