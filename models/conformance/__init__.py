"""The onnx package's backend tests through every command."""
