"""cp3: a convolution becomes 1×1 to R channels, a k×k depthwise conv, 1×1 to all outputs."""

from typing import ClassVar

from onnxlr.methods import CpPass


class Cp3(CpPass):
    """CP of the kernel as outputs × inputs × positions."""

    name: ClassVar[str] = "cp3"
    summary: ClassVar[str] = "S→T as 1×1 conv S→R, k×k depthwise, 1×1 conv R→T"
    paper: ClassVar[str] = "Phan et al. 2020, arXiv 2008.05441"
    equation: ClassVar[str] = "rs,ra,tr->tsa"
