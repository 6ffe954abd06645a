"""spatial-svd: a convolution becomes one along its first spatial axis, then one along the rest."""

import math
from typing import ClassVar

from onnxlr.methods import ConvPass, Layer, ints_attr, kernel_of


class SpatialSvd(ConvPass):
    """SVD of the kernel as (S·kh) × (T·kw), in each group alone.

    Each conv strides, pads and dilates along the axes of its kernel; the bias is on the second.
    """

    name: ClassVar[str] = "spatial-svd"
    summary: ClassVar[str] = "S→T as kh×1 conv S→r, 1×kw conv r→T"
    paper: ClassVar[str] = "Jaderberg et al. 2014, arXiv 1405.3866"
    automatic: ClassVar[bool] = True
    equation: ClassVar[str] = "rsa,trb->tsab"

    def refuse(self, layer: Layer) -> str | None:
        """Convolutions whose kernel extends along less than two axes."""
        if (reason := super().refuse(layer)) is not None:
            return reason
        kernel = kernel_of(layer)
        if len(kernel.spatial) < 2:
            return "spatial-svd needs two spatial axes, the kernel has one"
        if kernel.spatial[0] == 1 or math.prod(kernel.spatial[1:]) == 1:
            return f"spatial-svd has nothing to separate in a {kernel.extent} kernel"
        if any(ints_attr(use.node, "output_shape", ()) for use in layer.uses):
            return "spatial-svd can't tell the height in between from an output_shape"
        return None
