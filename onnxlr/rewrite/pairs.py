"""Inputs of a layer in two models side by side, and the regression of its output on the new ones.

M is what makes tr((y − M·x̂)²) least: with a covariance by normal equations; of inputs with tens of
thousands of elements from a sample of rows, in a space as small as there are rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxlr.calibrate.sampling import is_finite
from onnxlr.calibrate.statistics import RunningMoments, is_wide
from onnxlr.calibrate.wide import few_rows
from onnxlr.candidates.fitting import floored
from onnxlr.decompose import Covariance, Moments, shrunk_moments
from onnxlr.layers.kernel import as_matrix, matrix_sides
from onnxlr.layers.layer import Layer
from onnxlr.limits import SAMPLED_BYTES
from onnxlr.methods.choice import Choice, Factored
from onnxlr.model.attributes import float_attr
from onnxlr.model.constants import constant, to_float64
from onnxlr.prepare.originals import Originals, inputs_in_both
from onnxlr.prepare.prefix import Prefix
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.rewrite.replace import rewrite
from onnxlr.types import Array

Rows = NDArray[np.float32]
Values = Mapping[str, NDArray[Any]]
Inputs = Iterable[tuple[Values, Values]]  # of each run x̂ and x, by the names of values

# Of the mean variance of x̂: what the data don't tell about W is left as it was.
_RIDGE = 1e-2
_MEMORY = 256 << 20  # bytes of inputs that are held for a Relu, at most
_HELD_ROWS = 24  # inputs for each of their elements that are enough for it
# Inputs for each of their elements, below which a regression would learn the samples by heart.
_ROWS = 2
_WIDE_ROWS = 2048  # of a sample; a decomposition of as large a matrix takes seconds
_FEWEST = 32  # rows of a sample, below which nothing is corrected
# Of the mean eigenvalue of the rows' products: ridges that are tried, by leaving rows out.
_RIDGES = tuple(10.0**i for i in range(-3, 4))


class Pairs(Protocol):
    """Inputs of a layer in the model as compressed so far, x̂, beside the original's outputs y.

    Attributes
    ----------
    mean : ndarray of shape (g, n)
        Of x̂.
    centre : ndarray of shape (g, m)
        The mean of y, without the bias.
    moments : list of Moments
        Second moments of x̂ in each group.
    wanted : ndarray of shape (g, N, m) or None
        Some rows of y with the bias, where a Relu follows.
    """

    mean: Array
    centre: Array
    moments: Sequence[Moments]
    wanted: Rows | None

    def target(self, change: Rows | None) -> Array:
        """The regression of y on x̂, (g, m, n), or of y with a change of the rows' outputs."""

    def outputs(self, weight: Array) -> Rows:
        """What a weight (g, m, n) makes of x̂ in the rows of ``wanted``, (g, N, m)."""


class DensePairs:
    """Pairs by their covariances.

    Parameters
    ----------
    weight : ndarray of shape (g, m, n)
    running : RunningMoments
        Of x̂, paired with the original's inputs.
    kept : sequence of (ndarray, ndarray)
        Rows of x̂, and the original's outputs there with the bias.
    """

    def __init__(
        self, weight: Array, running: RunningMoments, kept: Sequence[tuple[Rows, Rows]]
    ) -> None:
        inputs, (original, cross) = running.statistics(), running.cross_moments()
        self.mean = inputs.mean
        self.centre = np.einsum("gmn,gn->gm", weight, original)
        covariance = inputs.covariance.copy()
        n = covariance.shape[1]
        ridge = _RIDGE * np.trace(covariance, axis1=1, axis2=2)[:, None, None] / n + 1e-30
        covariance += ridge * np.eye(n)
        # tr((W − W̃)…) is least for M = (W·C_xx̂ + ε·W)·(C_x̂ + ε)⁻¹, up to what no W̃ can reach.
        self._right = weight @ (cross + ridge * np.eye(n))
        self._triangles = [scipy.linalg.cho_factor(c) for c in covariance]
        self.moments: Sequence[Moments] = [Covariance(floored(c)) for c in covariance]
        self.wanted: Rows | None = None
        if kept:
            self._rows, self.wanted = (
                np.concatenate(parts, axis=1) for parts in zip(*kept, strict=True)
            )
            centre = self._rows.mean(axis=1, keepdims=True, dtype=np.float64)
            self._centred = self._rows - centre.astype(np.float32)

    def target(self, change: Rows | None) -> Array:
        """See ``Pairs``."""
        right = self._right
        if change is not None:
            # Only what differs from y is told from the rows at hand: y itself is from all of them.
            average = change.mean(axis=1, keepdims=True, dtype=np.float64)
            moved = (change - average).transpose(0, 2, 1) @ self._centred
            right = right + moved / change.shape[1]
            if not np.isfinite(right).all():
                return np.asarray(right)
        solved = [
            scipy.linalg.cho_solve(triangle, r.T).T
            for triangle, r in zip(self._triangles, right, strict=True)
        ]
        return np.stack(solved)

    def outputs(self, weight: Array) -> Rows:
        """See ``Pairs``."""
        return np.asarray(self._rows @ weight.astype(np.float32).transpose(0, 2, 1))


class WidePairs:
    """Pairs by a sample of rows: M = W + Eᵀ·(X̂X̂ᵀ + λ)⁻¹·X̂, E what W·x̂ lacks of y.

    How large λ is, each row tells that is left out of the regression of the others (Allen 1974);
    where every λ makes it worse, M is W.

    Parameters
    ----------
    weight : ndarray of shape (g, m, n)
    inputs : ndarray of shape (g, N, n)
        Rows of x̂, which become rows about their mean.
    outputs : ndarray of shape (g, N, m)
        y without the bias.
    bias : ndarray of shape (g, 1, m) or None
        The bias, where a Relu follows.
    """

    def __init__(self, weight: Array, inputs: Rows, outputs: Rows, bias: Rows | None) -> None:
        self._weight, self._rows = weight, inputs
        self.mean: Array = inputs.mean(axis=1, dtype=np.float64)
        inputs -= self.mean[:, None].astype(np.float32)
        self.centre: Array = outputs.mean(axis=1, dtype=np.float64)
        self.moments: Sequence[Moments] = [shrunk_moments(rows) for rows in inputs]
        self.wanted: Rows | None = None if bias is None else outputs + bias
        made = inputs @ weight.astype(np.float32).transpose(0, 2, 1)
        self._lacking = (outputs - self.centre[:, None] - made).astype(np.float64)
        self._solvers = [
            _left_out(rows, lacking) for rows, lacking in zip(inputs, self._lacking, strict=True)
        ]

    def target(self, change: Rows | None) -> Array:
        """See ``Pairs``."""
        lacking = self._lacking
        if change is not None:
            lacking = lacking + change - change.mean(axis=1, keepdims=True, dtype=np.float64)
        added = [
            solve(e).T.astype(np.float32) @ rows
            for solve, e, rows in zip(self._solvers, lacking, self._rows, strict=True)
        ]
        return np.asarray(self._weight + np.stack(added))

    def outputs(self, weight: Array) -> Rows:
        """See ``Pairs``."""
        single = weight.astype(np.float32).transpose(0, 2, 1)
        return np.asarray(self._rows @ single + self.mean[:, None].astype(np.float32) @ single)


def _left_out(rows: Rows, lacking: Array) -> Callable[[Array], Array]:
    """(X̂X̂ᵀ + λ)⁻¹ for the λ whose predictions of rows that are left out are the best."""
    values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
    values = np.maximum(values, 0.0)
    turned = vectors.T @ lacking
    best, chosen = float(np.sum(lacking**2)), math.inf
    for ridge in (float(values.mean()) * share for share in _RIDGES):
        if ridge <= 0:
            continue
        inverse = 1.0 / (values + ridge)
        solved = vectors @ (inverse[:, None] * turned)
        own = np.square(vectors) @ inverse  # the diagonal of the inverse
        error = float(np.sum(np.square(solved / own[:, None])))
        if error < best:
            best, chosen = error, ridge
    inverse = np.zeros_like(values) if math.isinf(chosen) else 1.0 / (values + chosen)
    return lambda right: np.asarray(vectors @ (inverse[:, None] * (vectors.T @ right)))


@np.errstate(over="ignore", invalid="ignore")  # beyond single precision: what isn't finite is told
def pairs_of(
    prepared: Prepared,
    choices: Mapping[str, Choice],
    factors: Mapping[str, Factored],
    layer: Layer,
    samples: Samples,
    originals: Originals,
    so_far: Prefix,
    seed: int,
    helper: Executor | None,
    *,
    rows: bool,
) -> Pairs | None:
    """The inputs of a layer in both models.

    It is None where the two inputs don't belong together, or too few were seen.
    """
    changed = rewrite(prepared.model, prepared.shapes, choices, factors)
    inputs = inputs_in_both(layer, changed, so_far, originals, samples)
    bias = bias_before_relu(layer) if rows else None
    if is_wide(layer):
        return _wide_pairs(layer, inputs, samples.runs, seed, bias)
    return _dense_pairs(layer, inputs, samples.runs, seed, helper, bias)


def _dense_pairs(
    layer: Layer, inputs: Inputs, feeds: int, seed: int, helper: Executor | None, bias: Rows | None
) -> Pairs | None:
    moments = RunningMoments(layer, feeds, seed, paired=True, helper=helper)
    groups, _, n = matrix_sides(layer)
    held = min(_HELD_ROWS * n, _MEMORY // (4 * groups * n))
    step = max(1, moments.row_target // max(held, 1))
    kept: list[tuple[Rows, Rows]] = []
    weight = as_matrix(layer, layer.array())
    single = weight.astype(np.float32).transpose(0, 2, 1)
    for x_hat, x in inputs:
        for use in layer.uses:
            pair = moments.add_pair(use, x_hat[use.x.name or ""], x[use.x.name or ""])
            if bias is not None and pair is not None:
                here, there = (p[:, ::step].astype(np.float32) for p in pair)
                kept.append((here, there @ single + bias))
    if moments.shapes_differ or moments.rows < _ROWS * n:
        return None
    return DensePairs(weight, moments, kept)


def _wide_pairs(
    layer: Layer, inputs: Inputs, feeds: int, seed: int, bias: Rows | None
) -> Pairs | None:
    weight = as_matrix(layer, layer.array())
    single = weight.astype(np.float32).transpose(0, 2, 1)
    groups, _, n = matrix_sides(layer)
    most = min(_WIDE_ROWS, SAMPLED_BYTES // (4 * groups * n))
    calls, seen, count = feeds * len(layer.uses), 0, 0
    rng = np.random.default_rng(seed)
    kept: list[tuple[Rows, Rows]] = []
    for x_hat, x in inputs:
        for use in layer.uses:
            seen += 1
            here, there = x_hat[use.x.name or ""], x[use.x.name or ""]
            if here.shape != there.shape:  # the models chose by values, which differ
                return None
            want, place = most * seen // calls - count, int(rng.integers(2**63))
            if want <= 0 or not here.size:
                continue
            pair = [
                few_rows(layer, use, a, want, np.random.default_rng(place)) for a in (here, there)
            ]
            if all(map(is_finite, pair)):
                count += pair[0].shape[1]
                kept.append((pair[0], pair[1] @ single))
    if count < _FEWEST:
        return None
    rows, outputs = (np.concatenate(parts, axis=1) for parts in zip(*kept, strict=True))
    return WidePairs(weight, rows, outputs, bias)


def bias_before_relu(layer: Layer) -> Rows | None:
    """Bias of a layer whose every user feeds a Relu and nothing else, as (g, 1, m); else None."""
    biases = []
    for use in layer.uses:
        consumers = use.node.outputs[0].consumers()
        if use.node.outputs[0].is_graph_output() or len(consumers) != 1:
            return None
        if consumers[0].op_type != "Relu" or use.node.op_type not in ("Conv", "Gemm"):
            return None
        scaled = any(float_attr(use.node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        value = use.node.inputs[2] if len(use.node.inputs) > 2 else None
        tensor = constant(value)
        if scaled or use.slot == 0 or (value is not None and tensor is None):
            return None
        outputs = as_matrix(layer, layer.array()).shape[:2]
        bias = np.zeros(outputs) if tensor is None else to_float64(tensor)
        if bias.size != math.prod(outputs):
            return None
        biases.append(bias.reshape(outputs[0], 1, -1).astype(np.float32))
    return biases[0] if all(np.array_equal(b, biases[0]) for b in biases) else None
