"""cp: a convolution becomes 1×1 to R channels, one depthwise conv an axis, 1×1 to all outputs."""

from typing import ClassVar

from onnxlr.methods import CpPass, Form, Layer, ints_attr, kernel_of


class CpChain(CpPass):
    """CP of the kernel with a mode for each spatial axis; four convs for a 2-D kernel."""

    name: ClassVar[str] = "cp"
    summary: ClassVar[str] = "S→T as 1×1 conv S→R, kh×1 and 1×kw depthwise, 1×1 conv R→T"
    paper: ClassVar[str] = "Lebedev et al. 2015, arXiv 1412.6553"

    def refuse(self, layer: Layer) -> str | None:
        """What no CP takes, and convolutions whose axes can't be taken in turn."""
        if (reason := super().refuse(layer)) is not None:
            return reason
        if any(ints_attr(use.node, "output_shape", ()) for use in layer.uses):
            return "cp can't tell the sizes in between from an output_shape"
        return None

    def form(self, layer: Layer) -> Form:
        """Outputs, inputs and every axis, joined by one letter."""
        axes = "abcd"[: len(kernel_of(layer).spatial)]
        lines = ",".join(f"r{axis}" for axis in axes)
        return Form(f"rs,{lines},tr->ts{axes}")
