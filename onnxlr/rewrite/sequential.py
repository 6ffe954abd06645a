"""Sequential correction: each layer is fitted to the inputs that the layers before it now give.

In graph order the input x̂ of a layer comes from the model as compressed so far, and its factors are
fitted to the output y = W·x that the original had there: reduced-rank regression of y on x̂ (the
"asymmetric" correction of Zhang et al. 2015, arXiv 1505.06798). Where a Relu follows, what counts
is what it lets through: y is replaced by the z that costs least there, and the regression repeated.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import RunningMoments, Statistics, input_size, weight_only_reason
from onnxlr.candidates.fitting import THOROUGH, bias_shift, fit_matrix, rest_of
from onnxlr.layers.kernel import as_matrix
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice, Factored, Factors
from onnxlr.model.attributes import float_attr
from onnxlr.model.constants import constant, to_float64
from onnxlr.prepare.opening import session_of_values
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Progress
from onnxlr.rewrite.originals import Originals
from onnxlr.rewrite.replace import rewrite
from onnxlr.rewrite.variant import Variant
from onnxlr.system.session import ONE_CPU_THREAD
from onnxlr.types import Array

Rows = NDArray[np.float32]

# Of the mean variance of x̂: what the data don't tell about W is left as it was.
_RIDGE = 1e-2
# Weights of ‖z − W̃x̂‖² beside the error behind the Relu, one for each repetition.
_PENALTIES = (0.1, 0.3, 1.0)
_MEMORY = 256 << 20  # bytes of inputs that are held for it, at most
_HELD_ROWS = 24  # inputs for each of their elements that are enough for it
# Inputs for each of their elements, below which a regression would learn the samples by heart.
_ROWS = 2


def correct(
    prepared: Prepared,
    plain: Variant,
    statistics: Mapping[str, Statistics],
    samples: Samples,
    seed: int,
    progress: Progress,
    originals: Originals,
    *,
    glance: bool = False,
    processes: int = 1,
) -> Variant:
    """A variant whose every layer is fitted behind those before it.

    Parameters
    ----------
    prepared : Prepared
    plain : Variant
        Each layer fitted by itself: what stays where a layer's inputs can't be looked at.
    statistics : mapping of str to Statistics
        By layer name; their metric says how errors of a layer's output count.
    samples : Samples
        What the layers are corrected on.
    seed : int
        Of the positions that are sampled.
    progress : Progress
    originals : Originals
        What layers are given in the original on such samples.
    glance : bool
        Whether Relus are passed over: what tells sets apart in a third of the time.
    processes : int
        How many may work; with more than one, moments are summed while the models run on.

    Raises
    ------
    ModelError
        If a model so far fails on the samples.
    """
    choices = plain.choices
    corrected: dict[str, Factored] = {}
    layers = [layer for layer in prepared.layers if layer.name in choices]
    with progress.stage("correct in sequence", len(layers)) as step, _helper(processes) as helper:
        for layer in layers:
            choice, factored = choices[layer.name], plain.factors[layer.name]
            form = choice.graph_pass.form(layer)
            # Before the first of them nothing has changed; without a form nothing can be fitted.
            if corrected and form is not None and weight_only_reason(layer) is None:
                before = {name: choices[name] for name in corrected}
                pairs = _pairs(
                    *(prepared, before, corrected, layer, samples, originals, seed, helper),
                    rows=not glance,
                )
                if pairs is not None:
                    moments = statistics.get(layer.name)
                    metric = moments.metric if moments is not None else None
                    factored = _fitted(layer, choice, factored, pairs, metric)
            corrected[layer.name] = factored
            step(layer.name)
    return Variant(choices, corrected, len(samples))


@contextlib.contextmanager
def _helper(processes: int) -> Iterator[Executor | None]:
    """A thread that works beside this one, if more than one process may work."""
    if processes == 1:
        yield None
        return
    with ThreadPoolExecutor(1) as helper:
        yield helper


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Moments of a layer's inputs in the original, x, and in the model as compressed so far, x̂.

    Attributes
    ----------
    inputs : Statistics
        Of x̂.
    mean : ndarray of shape (g, n)
        Of x.
    cross : ndarray of shape (g, n, n)
        The covariance between x and x̂.
    rows : list of (ndarray, ndarray)
        Some of x̂, and of the output that the original had there; none where no Relu follows.
    """

    inputs: Statistics
    mean: Array
    cross: Array
    rows: list[tuple[Rows, Rows]]


@np.errstate(over="ignore", invalid="ignore")  # beyond single precision: see _behind_relu
def _pairs(
    prepared: Prepared,
    choices: Mapping[str, Choice],
    factors: Mapping[str, Factored],
    layer: Layer,
    samples: Samples,
    originals: Originals,
    seed: int,
    helper: Executor | None,
    *,
    rows: bool,
) -> _Pairs | None:
    """The inputs of a layer in both models.

    It is None where the two inputs don't belong together, or too few were seen.
    """
    names = frozenset(use.x.name or "" for use in layer.uses)
    changed = rewrite(prepared.model, prepared.shapes, choices, factors)
    after = session_of_values(changed, names, ONE_CPU_THREAD, prepared.source)
    moments = RunningMoments(layer, samples.runs, seed, paired=True, helper=helper)
    bias = bias_before_relu(layer) if rows else None
    held = min(_HELD_ROWS * input_size(layer), _MEMORY // (4 * layer.group * input_size(layer)))
    step = max(1, moments.row_target // max(held, 1))
    kept: list[tuple[Rows, Rows]] = []
    weight = as_matrix(layer, layer.array()).astype(np.float32)
    for feed, before in originals.values(names, samples):
        x, x_hat = dict(feed) | dict(before), dict(feed) | after.run(feed)
        for use in layer.uses:
            pair = moments.add_pair(use, x_hat[use.x.name or ""], x[use.x.name or ""])
            if bias is not None and pair is not None:
                here, there = (p[:, ::step].astype(np.float32) for p in pair)
                kept.append((here, there @ weight.transpose(0, 2, 1) + bias))
    if moments.shapes_differ or moments.rows < _ROWS * input_size(layer):
        return None
    return _Pairs(moments.statistics(), *moments.cross_moments(), kept)


def _fitted(
    layer: Layer, choice: Choice, plain: Factored, pairs: _Pairs, metric: Array | None
) -> Factored:
    """Reduced-rank regression of the original's output on the inputs as they are now."""
    weight = as_matrix(layer, layer.array())
    covariance = pairs.inputs.covariance.copy()
    n = covariance.shape[1]
    ridge = _RIDGE * np.trace(covariance, axis1=1, axis2=2)[:, None, None] / n + 1e-30
    covariance += ridge * np.eye(n)
    # tr((W − W̃)…) is least for M = (W·C_xx̂ + ε·W)·(C_x̂ + ε)⁻¹, up to what no W̃ can reach.
    right = weight @ (pairs.cross + ridge * np.eye(n))
    triangles = [scipy.linalg.cho_factor(c) for c in covariance]

    def regressed(right: Array, start: Factors, centre: Array) -> Factored:
        """Factors for a C_yx̂ and a mean of y, with the shift of the bias that goes with them."""
        solved = [
            scipy.linalg.cho_solve(triangle, r.T).T
            for triangle, r in zip(triangles, right, strict=True)
        ]
        target = np.stack(solved)
        doubles = tuple(f.astype(np.float64) for f in start)
        factors = fit_matrix(
            choice.graph_pass, layer, choice.rank, target, covariance, metric, THOROUGH, doubles
        )
        stored = tuple(f.astype(layer.dtype.numpy()) for f in factors)
        # ȳ − W·μ̂ is what the mean itself has moved by, W·μ̂ − W̃·μ̂ what the factors lose of it.
        rest = rest_of(choice.graph_pass, layer, choice.rank, stored)
        drift = centre - np.einsum("gmn,gn->gm", weight, pairs.inputs.mean)
        return Factored(stored, bias_shift(rest, pairs.inputs) + drift.reshape(-1))

    centre = np.einsum("gmn,gn->gm", weight, pairs.mean)
    best = regressed(right, plain.factors, centre)
    if not pairs.rows:
        return best

    def moved(cross: Array, mean: Array, start: Factors) -> Factored:
        """For outputs that differ from y by something of this C_·x̂ and this mean."""
        return regressed(right + cross, start, centre + mean)

    return _behind_relu(layer, choice, best, pairs, moved)


@np.errstate(over="ignore", invalid="ignore")
def _behind_relu(
    layer: Layer,
    choice: Choice,
    best: Factored,
    pairs: _Pairs,
    moved: Callable[[Array, Array, Factors], Factored],
) -> Factored:
    """The same for the part of the output that a Relu lets through, as far as it gets better.

    For fixed factors the best z has a closed form, element by element; for fixed z the factors are
    regressed anew. It is told in single precision, as far as that reaches.
    """
    inputs, y = (np.concatenate(parts, axis=1) for parts in zip(*pairs.rows, strict=True))
    bias = bias_before_relu(layer)
    assert bias is not None
    wanted = np.maximum(y, 0.0)
    weight = as_matrix(layer, layer.array())
    mean = inputs.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    centred = inputs - mean

    def output(factored: Factored) -> Rows:
        """What the replaced layer gives for these inputs."""
        assert factored.shift is not None
        rest = rest_of(choice.graph_pass, layer, choice.rank, factored.factors)
        small = (weight - rest).astype(np.float32).transpose(0, 2, 1)
        shift = factored.shift.reshape(len(weight), 1, -1).astype(np.float32)
        return np.asarray(inputs @ small + bias + shift)

    reached = output(best)
    error = float(np.sum(np.square(wanted - np.maximum(reached, 0.0), dtype=np.float64)))
    current = best
    for penalty in _PENALTIES:
        # Only what differs from y is told from the rows at hand: y itself is from all of them.
        change = _let_through(wanted, reached, penalty) - y
        average = change.mean(axis=1, keepdims=True, dtype=np.float64)
        cross = (change - average).transpose(0, 2, 1) @ centred / inputs.shape[1]
        if not (np.isfinite(cross).all() and np.isfinite(average).all()):
            break
        current = moved(cross, average[:, 0], current.factors)
        reached = output(current)
        now = float(np.sum(np.square(wanted - np.maximum(reached, 0.0), dtype=np.float64)))
        if now < error:
            best, error = current, now
    return best


def _let_through(wanted: Rows, reached: Rows, penalty: float) -> Rows:
    """The z that makes (wanted − max(z, 0))² + penalty · (z − reached)² least, for each element."""
    above = np.maximum((penalty * reached + wanted) / (penalty + 1), 0.0)
    below = np.minimum(reached, 0.0)
    cost_above = (wanted - above) ** 2 + penalty * (above - reached) ** 2
    cost_below = wanted**2 + penalty * (below - reached) ** 2
    return np.where(cost_above <= cost_below, above, below)


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
