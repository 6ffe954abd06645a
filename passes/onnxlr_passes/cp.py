"""cp: a convolution becomes 1×1 to R channels, a line a channel and axis, 1×1 to all outputs."""

from typing import ClassVar

import onnx_ir as ir

from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.convolution import bias_of, pointwise, slide
from onnxlr.methods.cp import CpPass
from onnxlr.methods.writer import Writer
from onnxlr.model.attributes import ints_attr
from onnxlr.types import Rank


class CpChain(CpPass):
    """CP of the kernel with a mode for each spatial axis; four convs for a 2-D kernel."""

    name: ClassVar[str] = "cp"
    summary: ClassVar[str] = "S→T as 1×1 conv S→R, kh×1 and 1×kw depthwise, 1×1 conv R→T"
    paper: ClassVar[str] = "Lebedev et al. 2015, arXiv 1412.6553"

    def refuse(self, layer: Layer) -> str | None:
        """Ungrouped convolutions with a kernel larger than 1×1 whose axes can be taken in turn."""
        if (reason := super().refuse(layer)) is not None:
            return reason
        if any(ints_attr(use.node, "output_shape", ()) for use in layer.uses):
            return "cp can't tell the sizes in between from an output_shape"
        return None

    def tensor_shape(self, kernel: Kernel) -> tuple[int, ...]:
        """(T, S, kh, kw)."""
        return kernel.outputs, kernel.inputs, *kernel.spatial

    def kernels(self, layer: Layer, rank: Rank) -> tuple[Kernel, ...]:
        """In the order of the chain."""
        kernel, (r,) = kernel_of(layer), rank
        count = len(kernel.spatial)
        ones = (1,) * count
        lines = (
            Kernel(r, 1, 1, (*ones[:i], size, *ones[i + 1 :]), kernel.transposed)
            for i, size in enumerate(kernel.spatial)
        )
        return (
            Kernel(1, r, kernel.inputs, ones),
            *lines,
            Kernel(1, kernel.outputs, r, ones),
        )

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """Each line slides along its own axis as the original did; the bias is on the last node."""
        first, *lines, last = self.kernels(layer, rank)
        hidden = pointwise(writer, use.x, factors[0], first)
        for axis, line in enumerate(lines):
            hidden = slide(writer, use, hidden, factors[axis + 1], line, axes=(axis,))
        return pointwise(writer, hidden, factors[-1], last, bias_of(use))
