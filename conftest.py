"""What pytest leaves out where the extra ``train`` isn't installed: the doctests of training."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["onnxlr/training/*"]
