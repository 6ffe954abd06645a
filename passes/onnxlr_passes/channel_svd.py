"""channel-svd: a convolution becomes the same one with r outputs, then a 1×1 Conv to them all."""

from typing import ClassVar

from onnxlr.methods import ConvPass


class ChannelSvd(ConvPass):
    """SVD of the lowered kernel T × (S·kh·kw), in each group alone.

    The first conv has the original's strides, pads and dilations, the second its bias.
    """

    name: ClassVar[str] = "channel-svd"
    summary: ClassVar[str] = "S→T as k×k conv S→r, 1×1 conv r→T"
    paper: ClassVar[str] = "Zhang et al. 2015, arXiv 1505.06798"
    automatic: ClassVar[bool] = True
    equation: ClassVar[str] = "rsp,tr->tsp"
