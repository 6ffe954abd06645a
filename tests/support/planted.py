"""Models with widths of which some channels are redundant, one for every carrier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxlr.layers.operators import GATES
from tests.support.builders import Array, make_model, node

CHANNELS = 12
COPIES = ((3, 1), (7, 1), (10, 4))  # channel, and the one that it repeats
DEAD = 5
# What goes, and what may: of channels that are equal it doesn't matter which one stays.
GOES = len(COPIES) + 1
HEADS = 3  # each has one of those that go


@dataclass
class Plant:
    """A graph in the making: what is written into channels is repeated in their copies.

    Parameters
    ----------
    seed : int
    linear : bool
        Whether channel 8 is a combination of channels 0 and 2, and channel 9 constant: neither
        survives a function in between.
    """

    seed: int
    linear: bool = False
    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; its output has its name."""
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(node(kind, inputs, name, name, **attributes))
        return name

    def constant(self, *shape: int, axis: int | None = None, scale: float = 1.0) -> str:
        """A random constant; along an axis of channels, copies are equal."""
        array = self.rng.standard_normal(shape) * scale
        if axis is not None and shape[axis] == CHANNELS:
            moved = np.moveaxis(array, axis, 0)
            for copy, origin in COPIES:
                moved[copy] = moved[origin]
        return self.store(array)

    def store(self, array: Array) -> str:
        """A constant of these values."""
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(array, np.float32 if array.dtype.kind == "f" else None)
        return name

    def writer(self, x: str, inputs: int, kernel: int = 3, outputs: int = CHANNELS) -> str:
        """A convolution that writes channels."""
        weight = self.constant(outputs, inputs, kernel, kernel, axis=0, scale=0.3)
        bias = self.constant(outputs, axis=0)
        if self.linear:
            w, b = self.weights[weight], self.weights[bias]
            w[8], b[8] = 0.5 * w[0] - 2 * w[2], 0.5 * b[0] - 2 * b[2]
            w[9] = 0
        return self.op("Conv", x, weight, bias, pads=[kernel // 2] * 4)

    def reader(self, x: str, inputs: int = CHANNELS, kernel: int = 1, offset: int = 0) -> str:
        """A convolution that reads channels, all but the dead one."""
        weight = self.constant(6, inputs, kernel, kernel, scale=0.3)
        self.weights[weight][:, offset + DEAD] = 0
        return self.op("Conv", x, weight, self.constant(6), pads=[kernel // 2] * 4)

    def recurrent(self, x: str, cell: str, direction: str) -> str:
        """A recurrent operator that reads the channels of each position, all but the dead one."""
        count, hidden = 2 if direction == "bidirectional" else 1, 5
        gates = GATES[cell] * hidden
        weight, state = self.constant(count, gates, CHANNELS), self.constant(count, gates, hidden)
        self.weights[weight][..., DEAD] = 0
        bias = self.constant(count, 2 * gates)
        rows = self._rows(x, [2, 0, 1])
        return self.op(*(cell, rows, weight, state, bias), hidden_size=hidden, direction=direction)

    def attention(self, x: str) -> str:
        """ONNX Runtime's Attention, whose one weight projects the channels three times."""
        weight = self.constant(CHANNELS, 24, scale=0.5)
        self.weights[weight][DEAD] = 0
        rows, bias = self._rows(x, [0, 2, 1]), self.constant(24)
        return self.op(*("Attention", rows, weight, bias), domain="com.microsoft", num_heads=2)

    def _rows(self, x: str, perm: list[int]) -> str:
        flat = self.op("Reshape", x, self.store(np.array([2, CHANNELS, -1])))
        return self.op("Transpose", flat, perm=perm)

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The model so far."""
        return make_model(self.nodes, {"x": [2, 4, 8, 8]}, list(outputs), self.weights)


Carrier = Callable[[Plant, str], str]


def squeeze_and_excite(plant: Plant, x: str) -> str:
    """A gate that the same channels write."""
    means = plant.op("GlobalAveragePool", x)
    squeezed = plant.op("Relu", plant.reader(means))
    gate = plant.writer(squeezed, 6, 1)
    return plant.op("Mul", x, plant.op("Sigmoid", gate))


def batch_norm(plant: Plant, x: str) -> str:
    """Numbers for each channel; a Sigmoid keeps it from being folded into a convolution."""
    parts = [plant.constant(CHANNELS, axis=0) for _ in range(3)]
    variance = plant.constant(CHANNELS, axis=0)
    plant.weights[variance] = np.square(plant.weights[variance]) + 0.5
    return plant.op("BatchNormalization", plant.op("Sigmoid", x), *parts, variance)


def depthwise(plant: Plant, x: str) -> str:
    """A convolution of each channel alone."""
    weight = plant.constant(CHANNELS, 1, 3, 3, axis=0)
    bias = plant.constant(CHANNELS, axis=0)
    return plant.op("Conv", x, weight, bias, group=CHANNELS, pads=[1, 1, 1, 1])


def residual(plant: Plant, x: str) -> str:
    """A sum with what another convolution writes."""
    return plant.op("Add", x, plant.writer("x", 4))


def transposed(plant: Plant, x: str) -> str:
    """The channels behind the other axes, and back."""
    last = plant.op("Transpose", x, perm=[0, 2, 3, 1])
    scaled = plant.op("Mul", last, plant.constant(CHANNELS, axis=0))
    return plant.op("Transpose", scaled, perm=[0, 3, 1, 2])


def joined_and_cut(plant: Plant, x: str) -> str:
    """Beside other channels, and cut out of the list again."""
    both = plant.op("Concat", plant.writer("x", 4, 1, 5), x, axis=1)
    bounds = [np.array([5]), np.array([5 + CHANNELS]), np.array([1])]
    return plant.op("Slice", both, *(plant.store(b) for b in bounds))


def cut_from_the_first(plant: Plant, x: str) -> str:
    """The same, where nothing is before them in the list."""
    both = plant.op("Concat", x, plant.writer("x", 4, 1, 5), axis=1)
    bounds = [np.array([0]), np.array([CHANNELS]), np.array([1])]
    return plant.op("Slice", both, *(plant.store(b) for b in bounds))


def gated(plant: Plant, x: str) -> str:
    """One convolution writes both halves, the one the gate of the other."""
    weight = plant.store(plant.rng.standard_normal((2 * CHANNELS, CHANNELS, 1, 1)) * 0.3)
    for half in (0, CHANNELS):
        for copy, origin in COPIES:
            plant.weights[weight][half + copy] = plant.weights[weight][half + origin]
    # The dead channel of what this one reads is another than that of what it writes.
    plant.weights[weight][:, DEAD] = 0
    both = plant.op("Conv", x, weight)
    left, right = f"left{len(plant.nodes)}", f"right{len(plant.nodes)}"
    sizes = plant.store(np.array([CHANNELS, CHANNELS]))
    split = onnx.helper.make_node("Split", [both, sizes], [left, right], axis=1)
    plant.nodes.append(split)
    return plant.op("Mul", left, plant.op("Sigmoid", right))


def deconvolved(plant: Plant, x: str) -> str:
    """Read and written anew by a ConvTranspose."""
    weight = plant.constant(CHANNELS, CHANNELS, 2, 2, axis=1, scale=0.3)
    plant.weights[weight][DEAD] = 0
    return plant.op("ConvTranspose", x, weight, plant.constant(CHANNELS, axis=0), strides=[2, 2])


def scaled(plant: Plant, x: str) -> str:
    """A factor and a summand for each channel."""
    factor = plant.constant(CHANNELS, 1, 1, axis=0)
    return plant.op("Add", plant.op("Mul", x, factor), plant.constant(1, CHANNELS, 1, 1, axis=1))


def slopes(plant: Plant, x: str) -> str:
    """A slope for each channel."""
    return plant.op("PRelu", x, plant.constant(CHANNELS, 1, 1, axis=0))


def pooled(plant: Plant, x: str) -> str:
    """Windows along the other axes."""
    return plant.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])


def in_heads(plant: Plant, x: str) -> str:
    """Three heads of four channels, which attention mixes over the positions, and back."""
    count = 64
    rows = plant.op("Transpose", _shaped(plant, x, 2, CHANNELS, count), perm=[0, 2, 1])
    apart = plant.op("Transpose", _shaped(plant, rows, 2, count, HEADS, -1), perm=[0, 2, 1, 3])
    # What a constant weighs would be a layer: the scores hang on the input.
    scores = plant.op("Mul", plant.constant(1, 1, count, count), plant.op("ReduceMean", "x"))
    mixed = plant.op("MatMul", plant.op("Softmax", scores, axis=-1), apart)
    together = plant.op("Transpose", mixed, perm=[0, 2, 1, 3])
    last = plant.op("Transpose", _shaped(plant, together, 2, count, CHANNELS), perm=[0, 2, 1])
    return _shaped(plant, last, 2, -1, 8, 8)


def in_blocks(plant: Plant, x: str) -> str:
    """Blocks of positions into channels, and back in the other order of the two."""
    deep = plant.op("SpaceToDepth", x, blocksize=2)
    weight = plant.constant(4 * CHANNELS, 4 * CHANNELS, 1, 1, scale=0.2)
    array = plant.weights[weight].reshape(CHANNELS, 4, 4, CHANNELS)  # CRD rows, DCR columns
    for copy, origin in COPIES:
        array[copy] = array[origin]
    array[..., DEAD] = 0
    return plant.op("DepthToSpace", plant.op("Conv", deep, weight), blocksize=2, mode="CRD")


def flattened_blocks(plant: Plant, x: str) -> str:
    """Four channels become one of four times the positions."""
    weight = plant.constant(4 * CHANNELS, CHANNELS, 1, 1, scale=0.3)
    array = plant.weights[weight].reshape(4, CHANNELS, CHANNELS)
    for copy, origin in COPIES:
        array[:, copy] = array[:, origin]
    array[..., DEAD] = 0
    return plant.op("DepthToSpace", plant.op("Conv", x, weight), blocksize=2)


def _shaped(plant: Plant, x: str, *shape: int) -> str:
    return plant.op("Reshape", x, plant.store(np.array(shape)))


CARRIERS: dict[str, Carrier] = {
    "relu": lambda plant, x: plant.op("Relu", x),
    "swish": lambda plant, x: plant.op("Mul", x, plant.op("Sigmoid", x)),
    "pool": pooled,
    "batch norm": batch_norm,
    "depthwise": depthwise,
    "squeeze and excite": squeeze_and_excite,
    "residual": residual,
    "transposed": transposed,
    "concat and slice": joined_and_cut,
    "slice from the first": cut_from_the_first,
    "gated": gated,
    "deconvolved": deconvolved,
    "scaled": scaled,
    "slopes": slopes,
    "heads": in_heads,
    "blocks": in_blocks,
    "more positions": flattened_blocks,
}


def planted(seed: int, carriers: Sequence[str], kernel: int = 1) -> onnx.ModelProto:
    """A model whose channels go through these carriers, with copies and a dead channel."""
    plant = Plant(seed)
    value = plant.writer("x", 4)
    for name in carriers:
        value = CARRIERS[name](plant, value)
    return plant.model(plant.reader(value, kernel=kernel))
