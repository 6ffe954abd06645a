"""What onnxlr and other tools make of a model together, in either order."""
