"""Folding inference BatchNormalization into the Conv before it."""

import numpy as np
import onnx_ir as ir

from onnxlr.model.attributes import float_attr, int_attr
from onnxlr.model.constants import constant, to_float64
from onnxlr.model.graph import (
    DEFAULT_VALUES_IR,
    Names,
    add_initializer,
    all_graphs,
    copy_metadata,
    is_standard,
    opset,
    remove_unused,
)


def fold_batch_norms(model: ir.Model) -> int:
    """Fold every inference BatchNormalization into the Conv before it, in place.

    Only where the Conv's output goes nowhere else, all parameters are constants, and the weight
    belongs to this Conv alone. Done before factorizing because the scale decides which output
    channels matter. Returns the number folded.
    """
    folded, names, version = 0, Names(model), opset(model)
    overridable = model.ir_version >= DEFAULT_VALUES_IR
    for graph in all_graphs(model):
        for node in list(graph):
            if is_standard(node, "BatchNormalization"):
                folded += _fold_batch_norm(graph, node, names, version, overridable)
    return folded


def _fold_batch_norm(
    graph: ir.Graph, norm: ir.Node, names: Names, version: int, overridable: bool
) -> bool:
    inner = norm.inputs[0]
    conv = inner.producer() if inner is not None else None
    if inner is None or conv is None or not is_standard(conv, "Conv") or conv.graph is not graph:
        return False
    if inner.is_graph_output() or len(inner.uses()) != 1 or len(norm.inputs) != 5:
        return False
    # What says "training" is an attribute from opset 14 on, before that the number of outputs.
    if len(norm.outputs) > 1:
        return False
    if int_attr(norm, "training_mode", 0) or (version < 9 and not int_attr(norm, "spatial", 1)):
        return False
    weight = conv.inputs[1]
    old_bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    folded = [v for v in (*conv.inputs[1:], *norm.inputs[1:]) if v is not None]
    if overridable and any(v.is_graph_input() for v in folded):
        return False  # a caller may feed another value in its place
    stored = constant(weight)
    parameters = [constant(v) for v in norm.inputs[1:]]
    bias_tensor = constant(old_bias)
    if weight is None or stored is None or len(weight.uses()) != 1 or weight.is_graph_output():
        return False
    if None in parameters or (old_bias is not None and bias_tensor is None):
        return False
    known = [t for t in (*parameters, bias_tensor) if t is not None]
    channels = tuple(int(d) for d in tuple(stored.shape)[:1])  # type: ignore[arg-type]
    if any(tuple(t.shape) != channels or 0 in channels for t in known):
        return False
    scale, shift, mean, variance = (to_float64(t) for t in parameters if t is not None)
    spread = variance + float_attr(norm, "epsilon", 1e-5)
    if not (spread > 0).all():
        return False
    factor = scale / np.sqrt(spread)
    bias = to_float64(bias_tensor) if bias_tensor is not None else np.zeros_like(mean)
    kernel = to_float64(stored)
    dtype = stored.dtype.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # what doesn't fit its type isn't folded
        new_kernel = (kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))).astype(dtype)
        new_bias = ((bias - mean) * factor + shift).astype(dtype)
    if not (np.isfinite(new_kernel).all() and np.isfinite(new_bias).all()):
        return False
    stem = weight.name or conv.name or "conv"
    weights = [
        add_initializer(graph, names.unused(f"{stem}/batch_norm_folded"), new_kernel, stored.dtype),
        add_initializer(
            graph, names.unused(f"{stem}/batch_norm_folded_bias"), new_bias, stored.dtype
        ),
    ]
    replacement = ir.Node(
        "", "Conv", [conv.inputs[0], *weights], conv.attributes.values(), name=conv.name
    )
    copy_metadata(norm.outputs[0], replacement.outputs[0])
    ir.convenience.replace_nodes_and_values(
        graph, norm, [conv, norm], [replacement], [norm.outputs[0]], [replacement.outputs[0]]
    )
    remove_unused(folded)
    return True
