"""Low-rank training of PyTorch modules: DeepTwist, and modules factorized in place.

Needs the extra ``train``. Both share their decompositions with the graph passes, and tell what they
do with the decisions of a plan, as ``onnxlr optimize`` does.

Two lines make a training loop end on weights that factorize without loss::

    twist = DeepTwist(model, method="tucker2", rank=0.25, every=200)
    for image, label in batches:
        ...
        optimizer.step()
        twist.step()
    twist.finish()
"""

try:
    from onnxlr.training.factorized import factorize_
    from onnxlr.training.twist import DeepTwist
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "onnxlr.training needs PyTorch: python -m pip install 'onnxlr[train]'"
    ) from None

__all__ = ["DeepTwist", "factorize_"]
