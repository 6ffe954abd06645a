"""Tests of onnxlr.calibrate."""
