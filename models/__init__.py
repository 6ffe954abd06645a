"""Networks, experiments and checks behind the figures in the documents; onnxlr needs none."""
