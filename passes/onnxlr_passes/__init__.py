"""The graph passes that come with onnxlr, one a file."""
