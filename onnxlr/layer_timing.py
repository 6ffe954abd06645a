"""Timing one layer beside its replacement, each alone in a model of its own."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxlr.errors import ModelError
from onnxlr.graph_pass import rank_words
from onnxlr.latency import MARGIN, interleave
from onnxlr.layers import Layer, Use, find_layers
from onnxlr.model import Names, add_initializer, opset, to_proto
from onnxlr.rewrite import Choice, Factored, replace_layer
from onnxlr.runtime import Machine, Session

SECONDS = 0.12  # a comparison, unless told otherwise
_MOST_ROUNDS = 40


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer and of its replacement, with the noise of the latter.

    Attributes
    ----------
    before_ms, after_ms : float
        Sums of the median times over the layer's users.
    at_most_ms : float
        What the replacement takes at the slow end of the 95% intervals.
    """

    before_ms: float
    after_ms: float
    at_most_ms: float

    @property
    def faster(self) -> bool:
        """Whether the replacement is faster beyond noise."""
        return self.before_ms > (1 + MARGIN) * self.at_most_ms

    def refusal(self, choice: Choice) -> str:
        """Why a replacement that isn't faster isn't used."""
        return (
            f"{choice.graph_pass.name} at rank {rank_words(choice.rank)} takes "
            f"{self.after_ms:.3f} ms, the original {self.before_ms:.3f} ms: not measurably faster"
        )

    @property
    def saved_ms(self) -> float:
        """Milliseconds saved."""
        return self.before_ms - self.after_ms


@dataclass
class LayerTimer:
    """Times replacements, each distinct signature once.

    Values don't matter for time, so that weights and factors are random.
    """

    machine: Machine
    seconds: float | None = None
    _known: dict[Hashable, LayerTime | None] = field(default_factory=dict)

    def time(self, model: ir.Model, layer: Layer, choice: Choice) -> LayerTime | None:
        """Time a choice for a layer; None where shapes are unknown or the runtime refuses it."""
        parts = []
        for use in layer.uses:
            key = (signature(layer, use), choice.graph_pass.name, choice.rank)
            if key not in self._known:
                self._known[key] = self._measure(model, layer, use, choice)
            parts.append(self._known[key])
        if any(p is None for p in parts):
            return None
        times = [p for p in parts if p is not None]
        return LayerTime(
            sum(t.before_ms for t in times),
            sum(t.after_ms for t in times),
            sum(t.at_most_ms for t in times),
        )

    def _measure(self, model: ir.Model, layer: Layer, use: Use, choice: Choice) -> LayerTime | None:
        if use.x_shape is None or use.y_shape is None:
            return None
        alone = layer_model(layer, use, opset(model))
        replaced = alone.clone()
        (target,) = find_layers(replaced, {"x": use.x_shape, "y": use.y_shape})
        rng = np.random.default_rng(0)
        factors = tuple(
            rng.standard_normal(shape) * 0.1
            for shape in choice.graph_pass.factor_shapes(target, choice.rank)
        )
        replace_layer(replaced, target, choice, Factored(factors), Names(replaced))
        if layer.kind == "gather":
            feed = {"x": rng.integers(0, layer.shape[0], use.x_shape)}
        else:
            feed = {"x": rng.standard_normal(use.x_shape).astype(use.dtype.numpy())}
        try:
            a, b = (
                Session(to_proto(m).SerializeToString(), self.machine, layer.name).bound(feed)
                for m in (alone, replaced)
            )
            result = interleave(a, b, self.seconds or SECONDS, _MOST_ROUNDS)
        except (ModelError, RuntimeError):  # bfloat16 on the CPU, for one
            return None
        before = result.a.median_ms
        return LayerTime(before, result.b.median_ms, before / result.low)


def signature(layer: Layer, use: Use) -> Hashable:
    """All that decides how long a use of a layer takes."""
    attributes = sorted((name, str(a.value)) for name, a in use.node.attributes.items())
    return (
        use.node.op_type,
        tuple(attributes),
        layer.shape,
        use.swapped,
        use.slot,
        use.dtype,
        layer.dtype,
        use.x_shape,
        len(use.node.inputs),
    )


def layer_model(layer: Layer, use: Use, version: int) -> ir.Model:
    """A model of one node: input ``x`` of the known shape, random weight, output ``y``."""
    rng = np.random.default_rng(0)
    given = ir.DataType.INT64 if layer.kind == "gather" else use.dtype
    x = ir.Value(name="x", shape=ir.Shape(use.x_shape or ()), type=ir.TensorType(given))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": version}, name="layer")
    shape = layer.shape
    if use.swapped:
        shape = (*shape[:-2], shape[-1], shape[-2])
    inputs: list[ir.Value | None] = [x]
    inputs.insert(
        use.slot,
        add_initializer(graph, "weight", rng.standard_normal(shape) * 0.1, use.dtype),
    )
    if len(use.node.inputs) > 2 and use.node.inputs[2] is not None and use.y_shape is not None:
        size = use.y_shape[1] if layer.kind != "matrix" else use.y_shape[-1]
        inputs.append(add_initializer(graph, "bias", np.zeros(size), use.dtype))
    attributes = [ir.Attr(a.name, a.type, a.value) for a in use.node.attributes.values()]
    node = ir.Node("", use.node.op_type, inputs, attributes, name="layer")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(use.dtype), ir.Shape(use.y_shape or ())
    graph.append(node)
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=8)
