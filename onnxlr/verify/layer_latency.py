"""Timing one layer beside its replacement, each alone in a model of one node."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.errors import CrashError, ModelError, one_line
from onnxlr.layers.find import find_layers
from onnxlr.layers.layer import Layer, Use
from onnxlr.layers.operators import GATES, RECURRENT
from onnxlr.layers.siblings import share_of
from onnxlr.limits import Limits
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.cost import common_factor
from onnxlr.model.graph import Names, add_initializer, opset
from onnxlr.model.protobuf import serialize, to_proto
from onnxlr.rewrite.common import Common
from onnxlr.rewrite.replace import replace_layer
from onnxlr.system.deadline import Deadline
from onnxlr.system.sandbox import run_in_sandbox
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.types import ms_text, rank_text
from onnxlr.verify.latency import (
    MARGIN,
    Comparison,
    busy_words,
    decides_gain,
    interleave,
    runs_in_caller,
)

_PATIENCE = 300.0  # seconds for one comparison, however slow the layer is
_PRECISION = 0.03  # relative half-width at which the interval of what is faster is narrow
# What is declared need not be what is run: no memory and no minutes for sizes beyond all reason.
_MOST_ELEMENTS = 2**27  # of an input and an output
_MOST_MACS = 10**12
_BARE_GEMM = 11  # opset from which on a Gemm need not have a bias


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer and of its replacement, with the noise of the latter.

    Attributes
    ----------
    before_ms, after_ms : float
        Sums of the median times over the layer's users.
    at_most_ms : float
        What the replacement takes at the slow end of the 95% intervals.
    settled : bool
        Whether the intervals got narrow enough to tell whether it is faster, and by how much.
    busy : float
        Share of the time that was spent waiting for other processes.
    """

    before_ms: float
    after_ms: float
    at_most_ms: float
    settled: bool = True
    busy: float = field(default=0.0, compare=False)

    @property
    def faster(self) -> bool:
        """Whether the replacement is faster beyond noise."""
        return self.before_ms > (1 + MARGIN) * self.at_most_ms

    def refusal(self, choice: Choice) -> str:
        """Why a replacement that isn't faster isn't used."""
        if self is CRASHED:
            return f"{choice.graph_pass.name} at rank {rank_text(choice.rank)} crashed the runtime"
        takes = (
            f"{choice.graph_pass.name} at rank {rank_text(choice.rank)} takes "
            f"{ms_text(self.after_ms)} ms, the original {ms_text(self.before_ms)} ms"
        )
        if self.settled:
            return f"{takes}: not measurably faster"
        return f"{takes}: undecided, {busy_words(self.busy)}"

    @property
    def row(self) -> list[float]:
        """Its milliseconds, as they are written."""
        return [round(ms, 6) for ms in (self.before_ms, self.after_ms, self.at_most_ms)]

    def rounded(self) -> "LayerTime":
        """The same with the milliseconds that are written."""
        before, after, most = self.row
        return replace(self, before_ms=before, after_ms=after, at_most_ms=most)

    @property
    def share(self) -> float:
        """What the replacement takes of the layer's time."""
        return self.after_ms / self.before_ms

    @property
    def saved_ms(self) -> float:
        """Milliseconds saved."""
        return self.before_ms - self.after_ms


# Of a replacement that brought the runtime down.
CRASHED = LayerTime(1.0, math.inf, math.inf)


def measure(
    model: ir.Model,
    layer: Layer,
    use: Use,
    choice: Choice,
    machine: Machine,
    limits: Limits,
) -> LayerTime | None:
    """Time one use of a layer and what would replace it, interleaved.

    For a method that shares, all siblings are timed together, and the layer has its share. Values
    don't matter for time, so that weights and factors are random. None where shapes are unknown,
    too large to be run, or the runtime refuses it; ``CRASHED`` where that goes down.
    """
    family = [(layer, use)]
    if choice.graph_pass.shares:
        family = [(sibling, sibling.uses[0]) for sibling in layer.siblings]
    elements = macs = 0
    for member, each in family:
        if not each.sized:
            return None
        elements += math.prod(each.x_shape or ()) + math.prod(each.y_shape or ())
        macs += replace(member, uses=(each,)).macs or 0
    if elements > _MOST_ELEMENTS or macs > _MOST_MACS:
        return None
    alone = model_of_layers(family, opset(model))
    replaced = alone.clone()
    _replace_all(replaced, family, choice)
    rng = np.random.default_rng(0)
    if use.node.op_type == "Gather":
        feed = {"x": rng.integers(0, layer.shape[layer.lookup_axis(use)], use.x_shape)}
    else:
        feed = {"x": rng.standard_normal(use.x_shape or ()).astype(use.dtype.numpy())}
    try:
        models = tuple(serialize(to_proto(m), layer.name) for m in (alone, replaced))
        what = f"timing {choice.graph_pass.name} for {layer.name!r}"
        result = timed_apart(models, machine, feed, limits, what)
    except CrashError:
        return CRASHED
    except ModelError:  # bfloat16 on the CPU, for one
        return None
    before = result.a.median_ms
    if choice.graph_pass.shares:
        before *= share_of(layer)
    return LayerTime(
        before, before / result.speedup, before / result.low, result.settled, result.busy
    )


def _replace_all(model: ir.Model, family: Sequence[tuple[Layer, Use]], choice: Choice) -> None:
    """Replace every layer of a model that was made of them, by factors of random numbers."""
    shapes = {"x": family[0][1].x_shape or ()}
    for i, (_, use) in enumerate(family):
        if use.y_shape is not None:
            shapes[_numbered("y", i)] = use.y_shape
    names, common = Names(model), Common()
    for target in find_layers(model, shapes):
        if choice.graph_pass.refuse(target) is not None:  # the weight of a state, in its model
            continue
        rng = np.random.default_rng(0)  # anew: what siblings have in common is equal
        form_shapes = choice.graph_pass.factor_shapes(target, choice.rank)
        factors = [rng.standard_normal(shape) * 0.1 for shape in form_shapes]
        if choice.graph_pass.shares:
            i = common_factor(choice.graph_pass, target)
            factors[i] = np.random.default_rng(1).standard_normal(form_shapes[i]) * 0.1
        replace_layer(model, target, choice, Factored(tuple(factors)), names, common)


def timed_apart(
    models: Sequence[bytes], machine: Machine, feed: Feed, limits: Limits, what: str
) -> Comparison:
    """Two models timed in turn, in the child process: what crashes there costs a candidate only.

    Raises
    ------
    CrashError
        If the child process goes down.
    ModelError
        If the runtime refuses one of them.
    """
    return run_in_sandbox(
        _timed,
        models,
        machine,
        feed,
        limits,
        deadline=Deadline(_PATIENCE),
        task=what,
    )


def _timed(models: Sequence[bytes], machine: Machine, feed: Feed, limits: Limits) -> Comparison:
    a, b = (Session(m, machine).bind(feed) for m in models)
    try:
        return interleave(
            *(a, b, decides_gain(_PRECISION), limits.layer_seconds, limits.timing_rows),
            by_processor=runs_in_caller(machine),
        )
    except Exception as error:  # kinds that the runtime defines
        raise ModelError(one_line(error)) from None


def signature(layer: Layer, use: Use) -> str:
    """All that decides how long a use of a layer takes, to be read in a table."""
    attributes = sorted((name, a.value) for name, a in use.node.attributes.items())
    words = [
        use.node.op_type,
        "x".join(map(str, layer.shape)),
        f"on {list(use.x_shape or ())}",
        *(f"{n}={list(v) if isinstance(v, (list, tuple)) else v}" for n, v in attributes),
        use.dtype.name.lower(),
    ]
    if layer.dtype != use.dtype:
        words.append(f"stored as {layer.dtype.name.lower()}")
    if use.swapped:
        words.append("swapped")
    if use.slot == 0:
        words.append("weight first")
    if len(use.node.inputs) > 2:
        words.append("with bias")
    return " ".join(words)


def choice_words(layer: Layer, choice: Choice) -> tuple[str, str]:
    """A method and a rank as a table has them; with all siblings, if the method shares."""
    name, rank = choice.graph_pass.name, ",".join(map(str, choice.rank))
    if not choice.graph_pass.shares:
        return name, rank
    return f"{name} of {', '.join('x'.join(map(str, s.shape)) for s in layer.siblings)}", rank


def layer_model(
    layer: Layer, use: Use, version: int, weight: NDArray[np.generic] | None = None
) -> ir.Model:
    """A model of one node: input ``x`` of the use's shape, output ``y``, a bias of zeros if any.

    Parameters
    ----------
    layer : Layer
    use : Use
    version : int
        Of the opset.
    weight : ndarray, optional
        In the layer's shape; random without it.
    """
    return model_of_layers([(layer, use)], version, weight)


def model_of_layers(
    family: Sequence[tuple[Layer, Use]],
    version: int,
    weight: NDArray[np.generic] | None = None,
) -> ir.Model:
    """A model of a node for each of some layers, which have the input ``x`` in common.

    The first has the output ``y`` and a weight that may be given, the others numbers behind it.
    """
    use = family[0][1]
    x_type = ir.DataType.INT64 if use.node.op_type == "Gather" else use.dtype
    shape = None if use.x_shape is None else ir.Shape(use.x_shape)
    x = ir.Value(name="x", shape=shape, type=ir.TensorType(x_type))
    opsets = {"": version, use.node.domain: 1} if use.node.domain else {"": version}
    graph = ir.Graph([x], [], nodes=[], opset_imports=opsets, name="layer")
    for i, (layer, each) in enumerate(family):
        graph.outputs.append(_add_node(graph, layer, each, i, None if i else weight))
    return ir.Model(graph, ir_version=8)


def _state_shape(layer: Layer, use: Use) -> tuple[int, ...] | None:
    """The shape of what a recurrent operator multiplies its state by; None for other operators."""
    if use.node.op_type not in RECURRENT:
        return None
    return (*layer.shape[:2], layer.shape[1] // GATES[use.node.op_type])


def _numbered(name: str, i: int) -> str:
    return f"{name}{i or ''}"


def _add_node(
    graph: ir.Graph, layer: Layer, use: Use, i: int, weight: NDArray[np.generic] | None
) -> ir.Value:
    """Add the i-th layer's node, and return its output."""
    rng, version = np.random.default_rng(0), graph.opset_imports[""]
    if weight is None:
        weight = rng.standard_normal(layer.shape) * 0.1
    if use.swapped:
        weight = weight.swapaxes(-1, -2)
    inputs: list[ir.Value | None] = [graph.inputs[0]]
    inputs.insert(use.slot, add_initializer(graph, _numbered("weight", i), weight, use.dtype))
    state = _state_shape(layer, use)
    biased = len(use.node.inputs) > 2 and use.node.inputs[2] is not None
    if state is not None:
        recurrent = rng.standard_normal(state) * 0.1
        inputs.append(add_initializer(graph, _numbered("state", i), recurrent, use.dtype))
    elif layer.kind == "projection" and biased:
        zeros = np.zeros(layer.shape[-1])
        inputs.append(add_initializer(graph, _numbered("bias", i), zeros, use.dtype))
    elif biased and use.y_shape is not None:
        size = use.y_shape[1] if layer.convolves else use.y_shape[-1]
        bias = add_initializer(graph, _numbered("bias", i), np.zeros(size), use.dtype)
        inputs.append(bias)
    elif use.node.op_type == "Gemm" and version < _BARE_GEMM:
        inputs.append(add_initializer(graph, _numbered("bias", i), np.zeros(1), use.dtype))
    attributes = [ir.Attr(a.name, a.type, a.value) for a in use.node.attributes.values()]
    node = ir.Node(
        use.node.domain, use.node.op_type, inputs, attributes, name=_numbered("layer", i)
    )
    y = node.outputs[0]
    y.name, y.type = _numbered("y", i), ir.TensorType(use.dtype)
    y.shape = None if use.y_shape is None else ir.Shape(use.y_shape)
    graph.append(node)
    return y
