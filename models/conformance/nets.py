"""Small networks for the conformance check, of operators that every opset since 7 has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from models.conformance.cases import Case, Material, low_rank

_OPSET = 9  # that they are written in


@dataclass
class _Net:
    """A network in the making, with seeded weights of low rank."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def tensor(self, array: NDArray[Any]) -> str:
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.tensor(low_rank(self.rng, shape, max(1, min(shape[:2]) // 8)))

    def small(self, *shape: int) -> str:
        return self.tensor(self.rng.uniform(0.5, 1.5, shape).astype(np.float32))

    def norm(self, x: str, channels: int) -> str:
        return self.op("BatchNormalization", x, *(self.small(channels) for _ in range(4)))

    def material(self, last: str, shape: Sequence[int], *, most: int = 0) -> Material:
        """Return the network with two feeds, of indices below ``most`` unless it is 0."""
        kind = onnx.TensorProto.INT64 if most else onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [last], ["y"])],
            "net",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
        model.ir_version = 8
        model = onnx.shape_inference.infer_shapes(model)
        rng = np.random.default_rng(1)
        drawn = [
            rng.integers(0, most, shape) if most else rng.standard_normal(shape) for _ in range(2)
        ]
        dtype = np.int64 if most else np.float32
        return Material(model, tuple({"x": x.astype(dtype)} for x in drawn))


def _gemms() -> Material:
    net, x = _Net(), "x"
    for flip in (0, 1):
        x = net.op("Relu", net.op("Gemm", x, net.weight(64, 64), net.small(64), transB=flip))
    return net.material(net.op("Gemm", x, net.weight(64, 32), net.small(32)), (4, 64))


def _products() -> Material:
    net = _Net()
    x = net.op("Add", net.op("MatMul", "x", net.weight(48, 96)), net.small(96))
    x = net.op("MatMul", net.op("Tanh", x), net.weight(96, 48))
    return net.material(net.op("MatMul", net.weight(6, 6), x), (2, 6, 48))


def _convs() -> Material:
    net = _Net()
    x = net.op("Conv", "x", net.weight(32, 8, 3, 3), pads=[1] * 4)
    x = net.op("Relu", net.norm(x, 32))
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Conv", x, net.weight(32, 32, 3, 3), net.small(32), dilations=[2, 2], pads=[2] * 4)
    x = net.op("Flatten", net.op("GlobalAveragePool", net.norm(x, 32)))
    return net.material(net.op("Gemm", x, net.weight(32, 32), net.small(32)), (2, 8, 12, 12))


def _separable() -> Material:
    net = _Net()
    x = net.op("Conv", "x", net.weight(32, 1, 3, 3), group=32, pads=[1] * 4)
    x = net.op("Clip", net.norm(x, 32), min=0.0, max=6.0)
    x = net.op("Conv", x, net.weight(64, 32, 1, 1), net.small(64))
    x = net.op("Conv", x, net.weight(64, 32, 3, 3), group=2, strides=[2, 2], auto_pad="SAME_UPPER")
    return net.material(x, (1, 32, 9, 9))


def _signal() -> Material:
    net = _Net()
    x = net.op("LeakyRelu", net.op("Conv", "x", net.weight(48, 16, 5), pads=[2, 2]), alpha=0.1)
    x = net.op("ConvTranspose", x, net.weight(48, 24, 4), net.small(24), strides=[2], pads=[1, 1])
    return net.material(x, (2, 16, 20))


def _volume() -> Material:
    net = _Net()
    x = net.op("Conv", "x", net.weight(16, 8, 3, 3, 3), net.small(16))
    x = net.op("ConvTranspose", x, net.weight(16, 16, 2, 2, 2), strides=[2, 2, 2])
    return net.material(x, (1, 8, 5, 6, 7))


def _lookup() -> Material:
    net = _Net()
    x = net.op("Gather", net.weight(120, 64), "x")
    x = net.op("Transpose", x, perm=[1, 0, 2])
    size, hidden = 64, 32
    weights = [net.weight(1, 4 * hidden, size), net.weight(1, 4 * hidden, hidden)]
    net.nodes.append(
        helper.make_node("LSTM", [x, *weights], ["", "state"], "lstm", hidden_size=hidden)
    )
    x = net.op("Squeeze", "state", axes=[0])
    return net.material(net.op("Gemm", x, net.weight(32, 120), net.small(120)), (3, 7), most=120)


def _gated() -> Material:
    net = _Net()
    weights = [net.weight(1, 3 * 24, 32), net.weight(1, 3 * 24, 24)]
    net.nodes.append(helper.make_node("GRU", ["x", *weights], ["all"], "gru", hidden_size=24))
    x = net.op("MatMul", net.op("Squeeze", "all", axes=[1]), net.weight(24, 48))
    return net.material(net.op("Softmax", x, axis=2), (5, 2, 32))


def _attention() -> Material:
    net = _Net()
    q, k, v = (net.op("MatMul", "x", net.weight(32, 32)) for _ in range(3))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
    x = net.op("MatMul", net.op("Softmax", scores, axis=2), v)
    x = net.op("Add", "x", net.op("MatMul", x, net.weight(32, 32)))
    centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[2]))
    square = net.op("ReduceMean", net.op("Mul", centred, centred), axes=[2])
    return net.material(net.op("Div", centred, net.op("Sqrt", square)), (2, 9, 32))


def _shared() -> Material:
    net = _Net()
    weight = net.weight(64, 64)
    x = net.op("Relu", net.op("MatMul", "x", weight))
    x = net.op("Sum", x, net.op("MatMul", x, net.op("Transpose", weight, perm=[1, 0])))
    return net.material(net.op("Gemm", x, weight, net.small(64), transB=1, alpha=0.5), (6, 64))


_NETS: tuple[Callable[[], Material], ...] = (
    *(_gemms, _products, _convs, _separable, _signal, _volume),
    *(_lookup, _gated, _attention, _shared),
)


def net_cases(opsets: Sequence[int]) -> Iterator[Case]:
    """Yield every small network as it is written, and converted to each opset."""
    for make in _NETS:
        name = make.__name__.strip("_")
        yield Case(name, "networks", partial(make))
        yield from (Case(name, "networks", partial(make), opset) for opset in opsets)
