"""cp3: a convolution becomes 1×1 to R channels, a k×k kernel a channel, 1×1 to all outputs."""

from typing import ClassVar

import onnx_ir as ir

from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.convolution import bias_of, pointwise, slide
from onnxlr.methods.cp import CpPass
from onnxlr.methods.writer import Writer
from onnxlr.types import Rank


class Cp3(CpPass):
    """CP of the kernel as outputs × inputs × positions."""

    name: ClassVar[str] = "cp3"
    summary: ClassVar[str] = "S→T as 1×1 conv S→R, k×k depthwise, 1×1 conv R→T"
    paper: ClassVar[str] = "Phan et al. 2020, arXiv 2008.05441"

    def tensor_shape(self, kernel: Kernel) -> tuple[int, ...]:
        """(T, S, kh·kw)."""
        return kernel.outputs, kernel.inputs, kernel.positions

    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """In the order of the chain."""
        kernel, (r,) = kernel_of(layer), rank
        ones = (1,) * len(kernel.spatial)
        return (
            Kernel(1, r, kernel.inputs, ones),
            Kernel(r, 1, 1, kernel.spatial, kernel.transposed),
            Kernel(1, kernel.outputs, r, ones),
        )

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The middle conv slides as the original did; the bias is on the last node."""
        first, middle, last = self.kernels(layer, rank)
        hidden = pointwise(writer, use.x, factors[0], first)
        hidden = slide(writer, use, hidden, factors[1], middle)
        return pointwise(writer, hidden, factors[2], last, bias_of(use))
