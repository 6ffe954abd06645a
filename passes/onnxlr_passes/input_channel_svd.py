"""input-channel-svd: a convolution becomes a 1×1 Conv to r inputs, then the same one on those."""

from typing import ClassVar

import onnx_ir as ir

from onnxlr.methods import ConvPass, Layer, Rank, Use, Writer, bias_of, pointwise, slide


class InputChannelSvd(ConvPass):
    """SVD of the kernel as S × (T·kh·kw), in each group alone."""

    name: ClassVar[str] = "input-channel-svd"
    summary: ClassVar[str] = "S→T as 1×1 conv S→r, k×k conv r→T"
    paper: ClassVar[str] = "Li & Shi 2018, ECCV"
    automatic: ClassVar[bool] = True
    equation: ClassVar[str] = "rs,trp->tsp"

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The original's strides, pads, dilations and bias on the second node.

        The first has no bias, so that zero padding of its output is padding of its input. A Conv
        with a 1×1 kernel strides and pads in the first node, which then computes no more than
        needed.
        """
        mixing, sliding = self.kernels(layer, rank)
        if sliding.positions > 1 or sliding.transposed:
            return super().write(layer, use, rank, factors, writer)
        hidden = slide(writer, use, use.x, factors[0], mixing)
        return pointwise(writer, hidden, factors[1], sliding, bias_of(use))
