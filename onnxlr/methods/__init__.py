"""What a method is, and all that one is made of: whoever writes a pass imports from here alone.

It imports decompose, layers and what lies below.
"""

from onnxlr.decompose import (
    Cp,
    Form,
    RankRule,
    Spectrum,
    cp,
    cut_tiles,
    join_tiles,
    spectrum_of,
    tiled_svd,
    truncated_svd,
    tucker2,
)
from onnxlr.layers.kernel import Kernel, kernel_of
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.siblings import stack_of, stack_shape
from onnxlr.methods.base import ChainPass, GraphPass, InputPass, WeightPass
from onnxlr.methods.convolution import (
    ConvPass,
    bias_of,
    pointwise,
    refuse_other_ops,
    slide,
    swap_groups,
)
from onnxlr.methods.cp import CpPass
from onnxlr.methods.products import write_product
from onnxlr.methods.tiled import Grid, TiledPass
from onnxlr.methods.writer import ALLOWZERO, AttributeValue, Writer, integers, reshaped, sizes_of
from onnxlr.model.attributes import float_attr, int_attr, ints_attr
from onnxlr.types import Array, Rank, Shape

__all__ = [
    "ALLOWZERO",
    "Array",
    "AttributeValue",
    "ChainPass",
    "ConvPass",
    "Cp",
    "CpPass",
    "Form",
    "GraphPass",
    "Grid",
    "InputPass",
    "Kernel",
    "Layer",
    "Rank",
    "RankRule",
    "Shape",
    "Spectrum",
    "TiledPass",
    "Use",
    "WeightPass",
    "Writer",
    "bias_of",
    "cp",
    "cut_tiles",
    "float_attr",
    "int_attr",
    "integers",
    "ints_attr",
    "join_tiles",
    "kernel_of",
    "pointwise",
    "refuse_other_ops",
    "reshaped",
    "sizes_of",
    "slide",
    "spectrum_of",
    "stack_of",
    "stack_shape",
    "swap_groups",
    "tiled_svd",
    "truncated_svd",
    "tucker2",
    "write_product",
]
