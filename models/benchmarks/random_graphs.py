"""Random small ONNX graphs, seeded: convs, matrix products, branches, shared weights.

Weights are planted low-rank plus noise, of decaying spectrum, or noise, so that some graphs can be
factorized and some can't; sizes go from too small to gain anything to some 10 million
multiply-accumulates a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_MOST_MACS = 2e7  # of one layer; keeps a graph's run at milliseconds
_MOST_VALUES = 1 << 20  # of one tensor


@dataclass
class Sketch:
    """A graph in the making; every step appends to its end, a value whose shape is inferred.

    Attributes
    ----------
    shape : tuple of int
        Of the value: (N, C, H, W) or (N, C, L) where it is spatial, else (N, n) or (N, T, n).
    """

    rng: np.random.Generator
    shape: tuple[int, ...]
    spatial: bool
    value: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    sizes: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Append a node whose output is the new end."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        self.value = name

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return bool(self.rng.random() < probability)

    def pick(self, *options: int) -> int:
        """Return one of the numbers at random."""
        return int(self.rng.choice(options))

    def weight(self, *shape: int) -> str:
        """Return the name of a weight of this shape: a new one, or now and then an earlier one."""
        alike = [name for name, w in self.weights.items() if w.shape == shape]
        if alike and self.chance(0.25):
            return alike[0]
        name = f"w{len(self.weights)}"
        self.weights[name] = _spectral(self.rng, shape)
        return name

    def width(self, macs_each: float, multiple: int = 1) -> int:
        """Return a number of channels or features, each of which costs this many MACs."""
        most = max(2, math.log2(max(4.0, min(320.0, _MOST_MACS / macs_each))))
        whole = 2.0 ** self.rng.uniform(min(5.0, most), most)
        return max(1, int(whole) // multiple) * multiple

    def layer(self, *, same: bool = False) -> None:
        """Append a conv or a matrix product; ``same`` keeps the shape."""
        if not self.spatial:
            self.product(same=same)
        elif not same and math.prod(self.shape) * 8 < _MOST_VALUES and self.chance(0.12):
            self.transposed()
        else:
            self.conv(same=same)

    def conv(self, *, same: bool) -> None:
        """Append a conv in 1 or 2 dimensions, now and then with strides, dilations or groups."""
        channels, sides = self.shape[1], self.shape[2:]
        dims, kernel = len(sides), self.pick(1, 3, 3, 3, 5)
        group = self.pick(2, 4) if channels % 4 == 0 and self.chance(0.2) else 1
        stride = 1 if same or min(sides) < 8 or self.chance(0.7) else 2
        dilation = 2 if min(sides) > 8 and self.chance(0.15) else 1
        sides = tuple(-(-side // stride) for side in sides)
        each = math.prod(sides) * (channels // group) * kernel**dims
        outputs = channels if same else self.width(each, group)
        inputs = [self.value, self.weight(outputs, channels // group, *(kernel,) * dims)]
        if self.chance(0.5):
            inputs.append(self.weight(outputs))
        pad = dilation * (kernel - 1) // 2
        self.add(
            "Conv",
            inputs,
            group=group,
            strides=[stride] * dims,
            dilations=[dilation] * dims,
            pads=[pad] * (2 * dims),
        )
        self.shape = (self.shape[0], outputs, *sides)

    def transposed(self) -> None:
        """Append a ConvTranspose that doubles the sides."""
        channels, sides = self.shape[1], self.shape[2:]
        dims = len(sides)
        outputs = self.width(math.prod(sides) * channels * 4**dims)
        weight = self.weight(channels, outputs, *(4,) * dims)
        inputs, pads = [self.value, weight], [1] * (2 * dims)
        self.add("ConvTranspose", inputs, strides=[2] * dims, pads=pads)
        self.shape = (self.shape[0], outputs, *(2 * side for side in sides))

    def product(self, *, same: bool) -> None:
        """Append a Gemm if the value is a matrix, else a MatMul."""
        *lead, features = self.shape
        outputs = features if same else self.width(math.prod(lead) * features)
        if len(lead) == 1 and self.chance(0.6):
            turned = self.pick(0, 1)
            shape = (outputs, features) if turned else (features, outputs)
            inputs = [self.value, self.weight(*shape), self.weight(outputs)]
            self.add("Gemm", inputs, transB=turned)
        else:
            self.add("MatMul", [self.value, self.weight(features, outputs)])
        self.shape = (*lead, outputs)

    def residual(self) -> None:
        """Append one or two layers with a shortcut around them."""
        start = self.value
        for _ in range(self.pick(1, 2)):
            self.layer(same=True)
            self.add("Relu", [self.value])
        self.add("Add", [start, self.value])

    def gate(self) -> None:
        """Append the product of the value with the output of a layer on it."""
        start = self.value
        self.layer(same=True)
        self.add("Sigmoid", [self.value])
        self.add("Mul", [start, self.value])

    def pool(self) -> None:
        """Halve the sides of a large spatial value."""
        sides = self.shape[2:]
        if self.spatial and min(sides) >= 4:
            op, two = ("MaxPool", "AveragePool")[self.pick(0, 1)], [2] * len(sides)
            self.add(op, [self.value], kernel_shape=two, strides=two)
            self.shape = (*self.shape[:2], *(side // 2 for side in sides))

    def reshape(self) -> None:
        """Make one row of a small image, tokens of the channels of a large one, rows of tokens."""
        n, *rest = self.shape
        if len(rest) == 1:
            return
        if self.spatial:
            whole = math.prod(rest)
            self.shape = (n, whole) if whole <= 1024 else (n, rest[0], math.prod(rest[1:]))
        else:
            self.shape = (n * rest[0], rest[1])
        self.spatial = False
        name = f"shape_{len(self.nodes)}"
        self.sizes[name] = np.array(self.shape, dtype=np.int64)
        self.add("Reshape", [self.value, name])


def _spectral(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a weight whose unfolding along the first axis is low-rank, decaying or noise."""
    if len(shape) == 1:
        return rng.normal(0, 0.1, shape).astype(np.float32)
    m, n = shape[0], math.prod(shape[1:])
    full = min(m, n)
    whole = rng.standard_normal((m, n))
    kind = rng.choice(["planted", "decaying", "noise"], p=[0.45, 0.35, 0.2])
    if kind != "noise":
        rank = max(1, full // int(rng.choice([4, 8, 16]))) if kind == "planted" else full
        scales = np.ones(rank) if kind == "planted" else (1.0 + np.arange(rank)) ** -1.2
        left, right = rng.standard_normal((m, rank)) * scales, rng.standard_normal((rank, n))
        noise = 0.03 if kind == "planted" else 0.0
        whole = left @ right / np.linalg.norm(scales) + noise * whole
    # Either side may be the inputs; the larger one keeps values from growing.
    return (whole * math.sqrt(2 / max(m, n))).astype(np.float32).reshape(shape)


def random_graph(seed: int) -> onnx.ModelProto:
    """Return the graph of a seed: one input ``x``, one output ``y``, fixed sizes.

    >>> random_graph(0).graph.output[0].name
    'y'
    """
    rng = np.random.default_rng(seed)
    sketch = _start(rng)
    start = sketch.shape
    for _ in range(int(rng.integers(2, 8))):
        steps: tuple[Callable[[], None], ...] = (sketch.layer, sketch.residual, sketch.gate)
        steps[int(rng.choice(3, p=[0.65, 0.25, 0.1]))]()
        if sketch.chance(0.6):
            sketch.add("Relu", [sketch.value])
        if sketch.chance(0.25):
            sketch.pool()
        if sketch.chance(0.15):
            sketch.reshape()
    sketch.nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        sketch.nodes,
        f"graph-{seed}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, start)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sketch.shape)],
        [numpy_helper.from_array(w, n) for n, w in (sketch.weights | sketch.sizes).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8  # what ONNX Runtime has read since 1.12
    return model


def _start(rng: np.random.Generator) -> Sketch:
    """Return a sketch with its input only: an image, a signal, tokens or rows."""
    kind, width = rng.choice(4, p=[0.4, 0.2, 0.2, 0.2]), int(2 ** rng.uniform(3, 8))
    if kind == 0:
        side = int(2 ** rng.uniform(2.5, 5.5))
        return Sketch(rng, (1, max(1, min(width, 40_000 // side**2)), side, side), spatial=True)
    if kind == 1:
        return Sketch(rng, (1, width, int(2 ** rng.uniform(4, 9))), spatial=True)
    if kind == 2:
        return Sketch(rng, (1, int(2 ** rng.uniform(2, 7)), 2 * width), spatial=False)
    return Sketch(rng, (int(rng.choice([1, 8, 32])), 4 * width), spatial=False)
