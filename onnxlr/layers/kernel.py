"""Kernels of Conv and ConvTranspose seen alike, and weights as outputs × inputs."""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxlr.layers.layer import Layer
from onnxlr.types import Array, Shape

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Kernel:
    """A convolution's kernel as ``(group, outputs, inputs, *spatial)``, whichever way it is stored.

    ``outputs`` and ``inputs`` count the channels of one group. Conv stores the kernel as
    ``(group·outputs, inputs, *spatial)``, ConvTranspose as ``(group·inputs, outputs, *spatial)``.
    """

    group: int
    outputs: int
    inputs: int
    spatial: Shape
    transposed: bool = False

    @property
    def stored_shape(self) -> Shape:
        """The shape that the operator stores."""
        first, second = (
            (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        )
        return (self.group * first, second, *self.spatial)

    @property
    def positions(self) -> int:
        """Number of kernel positions."""
        return math.prod(self.spatial)

    @property
    def extent(self) -> str:
        """The spatial shape in words."""
        return "×".join(map(str, self.spatial))

    def load(self, stored: NDArray[T]) -> NDArray[T]:
        """A kernel in the stored shape as (group, outputs, inputs, positions)."""
        first, second = (
            (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        )
        array = stored.reshape(self.group, first, second, self.positions)
        return array.transpose(0, 2, 1, 3) if self.transposed else array

    def store(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """A kernel as it is stored, from one in the order (group, outputs, inputs, positions)."""
        array = array.reshape(self.group, self.outputs, self.inputs, self.positions)
        if self.transposed:
            array = array.transpose(0, 2, 1, 3)
        return array.reshape(self.stored_shape)


def kernel_of(layer: Layer) -> Kernel:
    """The kernel of a Conv or ConvTranspose layer."""
    group, (first, second, *spatial) = layer.group, layer.shape
    if layer.kind == "conv-transpose":
        return Kernel(group, second, first // group, tuple(spatial), transposed=True)
    return Kernel(group, first // group, second, tuple(spatial))


def as_matrix(layer: Layer, array: NDArray[np.generic]) -> Array:
    """A weight in the layer's shape as g matrices of outputs × inputs, (g, m, n), in float64.

    The inputs of a lookup are its entries: one of them is 1, all others are 0.
    """
    if layer.convolves:
        kernel = kernel_of(layer)
        loaded = kernel.load(array).reshape(kernel.group, kernel.outputs, -1)
    elif layer.kind == "gather":
        entries = np.moveaxis(array, layer.lookup_axis(layer.uses[0]), -1)
        loaded = entries.reshape(1, -1, entries.shape[-1])
    elif _has_directions(layer):
        loaded = array.reshape(1, -1, array.shape[-1])
    else:
        stack = array.reshape(-1, *array.shape[-2:])
        loaded = stack if layer.uses[0].contracts_last else stack.swapaxes(1, 2)
    return loaded.astype(np.float64)


def matrix_sides(layer: Layer) -> tuple[int, int, int]:
    """The shape (g, m, n) of ``as_matrix``."""
    if layer.convolves:
        kernel = kernel_of(layer)
        return kernel.group, kernel.outputs, kernel.inputs * kernel.positions
    if layer.kind == "gather":
        entries = layer.shape[layer.lookup_axis(layer.uses[0])]
        return 1, layer.params // max(1, entries), entries
    *lead, a, b = layer.shape
    if _has_directions(layer):
        return 1, math.prod(lead) * a, b
    return math.prod(lead), *((a, b) if layer.uses[0].contracts_last else (b, a))


def output_count(layer: Layer) -> int:
    """The number of output channels of all groups."""
    if layer.convolves:
        kernel = kernel_of(layer)
        return kernel.group * kernel.outputs
    if layer.kind == "gather":
        return matrix_sides(layer)[1]
    if _has_directions(layer):
        return matrix_sides(layer)[1]
    return layer.shape[-2] if layer.uses[0].contracts_last else layer.shape[-1]


def _has_directions(layer: Layer) -> bool:
    """Whether a weight (directions, gates, inputs) of a recurrent operator meets one input."""
    return layer.kind == "projection" and len(layer.shape) == 3
