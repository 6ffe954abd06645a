"""Tests of onnxlr.training."""
