"""Statistics of layers whose inputs have too many elements for a covariance: rows, and outputs."""

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.calibrate.sampling import doubled, is_finite, sample_outputs, sample_rows, whole_batch
from onnxlr.calibrate.statistics import (
    NO_COVARIANCE,
    WIDEST,
    Rows,
    RunningSums,
    Statistics,
    is_wide,
)
from onnxlr.layers.kernel import matrix_sides
from onnxlr.layers.layer import Layer, Use
from onnxlr.limits import SAMPLED_BYTES, SAMPLED_ROWS
from onnxlr.model.attributes import float_attr
from onnxlr.model.constants import constant

Values = NDArray[np.generic]


def rows_to_sample(layer: Layer, layers: int) -> int:
    """How many rows of a wide layer's inputs are kept, among so many layers that share the memory.

    All together take at most ``SAMPLED_BYTES``.
    """
    groups, _, n = matrix_sides(layer)
    row = 4 * groups * n
    return min(SAMPLED_ROWS, SAMPLED_BYTES // max(1, layers) // row)


def gives_product(layer: Layer) -> bool:
    """Whether the outputs of all users differ from W·x by a constant: their covariance is W·C·Wᵀ.

    It is looked at only if it is of a size that a closed form can take.
    """
    if layer.kind == "projection":  # whose operator does more than that
        return False
    groups, m, _ = matrix_sides(layer)
    return groups * m**2 <= WIDEST**2 and all(_scale(use) for use in layer.uses)


def watched(layer: Layer) -> list[tuple[Use, ir.Value]]:
    """The values that statistics of a layer are made from."""
    values = [(use, use.x) for use in layer.uses if constant(use.x) is None]
    if is_wide(layer) and gives_product(layer):
        values += [(use, use.node.outputs[0]) for use in layer.uses]
    return values


def _scale(use: Use) -> float:
    """What a user multiplies W·x by; 0 where what it adds may change from row to row."""
    bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
    tensor = constant(bias)
    if use.node.op_type != "Gemm":
        return 1.0 if bias is None or tensor is not None else 0.0
    if bias is not None and float_attr(use.node, "beta", 1.0) != 0.0:
        if tensor is None:
            return 0.0
        sizes = [int(n) for n in tensor.shape]  # type: ignore[arg-type]
        across = sizes[-1] if use.slot == 0 and sizes else math.prod(sizes[:-1])
        if across != 1:
            return 0.0
    return float_attr(use.node, "alpha", 1.0)


class WideMoments:
    """A sample of a wide layer's inputs, and running sums of its outputs.

    Parameters
    ----------
    layer : Layer
    rows : int
        How many rows all runs together keep, at most.
    first, runs : int
        The runs that follow start with this one of so many.
    seed : int
        Seed of the positions that are sampled.

    Attributes
    ----------
    rows : int
        How many rows are kept.
    """

    def __init__(self, layer: Layer, rows: int, first: int, runs: int, seed: int) -> None:
        self.rows = 0
        self._layer, self._most = layer, rows
        self._calls, self._all = first * len(layer.uses), runs * len(layer.uses)
        self._before = self._due()
        self._rng = np.random.default_rng(seed)
        self._kept: list[Rows] = []
        self._outputs = None
        if gives_product(layer):
            self._outputs = RunningSums(*matrix_sides(layer)[:2])

    def add(self, use: Use, x: Values, y: Values | None) -> None:
        """Keep some rows of the inputs of one run, and sum some of its outputs."""
        self._calls += 1
        if not x.size:
            return
        want = self._due() - self._before - self.rows
        if want > 0:
            rows = few_rows(self._layer, use, x, want, self._rng)
            if is_finite(rows):
                self.rows += rows.shape[1]
                self._kept.append(rows)
        if self._outputs is not None and y is not None and y.size:
            share = self._outputs.share(self._all)
            outputs = doubled(sample_outputs(self._layer, use, y, share, self._rng))
            if is_finite(outputs):
                self._outputs.collect(outputs / _scale(use), None)

    def _due(self) -> int:
        """How many rows are to be kept of all the runs so far."""
        return self._most * self._calls // max(1, self._all)

    def statistics(self) -> Statistics:
        """What was seen so far; the sample isn't about its mean yet (``centred``)."""
        sample = np.concatenate(self._kept, axis=1)
        outputs = None
        if self._outputs is not None and self._outputs.rows:
            outputs = self._outputs.statistics()
        mean = sample.mean(axis=1, dtype=np.float64)
        return Statistics(mean, NO_COVARIANCE, self.rows, sample=sample, outputs=outputs)


class Lookups:
    """How often each entry of a table is looked up.

    Attributes
    ----------
    rows : int
        The number of lookups.
    """

    def __init__(self, layer: Layer) -> None:
        self.rows = 0
        self._counts = np.zeros(matrix_sides(layer)[2], np.int64)

    def add(self, indices: Values) -> None:
        """Count the lookups of one run; indices below zero count from the end."""
        entries = len(self._counts)
        flat = indices.reshape(-1).astype(np.int64)
        self._counts += np.bincount(flat % entries, minlength=entries)
        self.rows += flat.size

    def statistics(self) -> Statistics:
        """What was seen so far. A lookup has no bias that could make up for a mean: it is zero."""
        mean = np.zeros((1, len(self._counts)))
        return Statistics(mean, NO_COVARIANCE, self.rows, lookups=self._counts)


def centred(statistics: Statistics) -> Statistics:
    """Statistics whose sample, if there is one, is about its mean."""
    if statistics.sample is None:
        return statistics
    sample = statistics.sample
    sample -= statistics.mean[:, None].astype(np.float32)
    return replace(statistics, sample=sample)


def few_rows(layer: Layer, use: Use, x: Values, count: int, rng: np.random.Generator) -> Rows:
    """At most so many rows of a user's inputs, (g, rows, n): of a few of the samples only."""
    if layer.convolves:
        x = whole_batch(layer, x)
    if layer.convolves and len(x) > count:
        x = x[np.sort(rng.choice(len(x), count, replace=False))]
    rows = sample_rows(layer, use, x, count, rng)
    if rows.shape[1] > count:
        rows = rows[:, np.sort(rng.choice(rows.shape[1], count, replace=False))]
    with np.errstate(invalid="ignore", over="ignore"):
        return rows.astype(np.float32)
