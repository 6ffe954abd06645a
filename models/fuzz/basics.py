"""Choices that every way of breaking a model makes: which one, which number, which weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, TensorProto

Rng = np.random.Generator
Recipe = Callable[[onnx.ModelProto, Rng], None]

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 100, 65_535, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**60),
    *(2**63 - 1, -(2**63), -7, -(2**31)),
)
FLOATS = (0.0, -1.0, 1e30, -1e30, 1e-45, float("inf"), float("-inf"), float("nan"), 0.5)


def graphs(model: onnx.ModelProto) -> list[GraphProto]:
    """Return the main graph and every body in it."""
    visited, waiting = [], [model.graph]
    while waiting:
        graph = waiting.pop()
        visited.append(graph)
        waiting += [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return visited


def pick(rng: Rng, options: Sequence[Any]) -> Any:
    """Return one of the options at random, or None if there are none."""
    return options[int(rng.integers(len(options)))] if len(options) else None


def any_weight(model: onnx.ModelProto, rng: Rng) -> TensorProto:
    """Return a weight of the model at random, or a new one if it has none."""
    weights = [t for g in graphs(model) for t in g.initializer]
    weights += [
        a.t
        for n in [*model.graph.node, *(n for f in model.functions for n in f.node)]
        for a in n.attribute
        if a.HasField("t")
    ]
    weight: TensorProto = pick(rng, weights) if weights else model.graph.initializer.add()
    return weight
