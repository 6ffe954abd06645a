"""Tests of onnxlr.model."""
