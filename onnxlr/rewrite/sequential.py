"""Sequential correction: each layer is fitted to what it is really given, once others have changed.

In graph order the input x̂ of a layer comes from the model as compressed so far, and its factors are
fitted to the output y = W·x that the original had there: reduced-rank regression of y on x̂ (the
"asymmetric" correction of Zhang et al. 2015, arXiv 1505.06798). Where a Relu follows, what counts
is what it lets through: y is replaced by the z that costs least there, and the regression repeated.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import RunningMoments, Statistics, input_size, weight_only_reason
from onnxlr.candidates.fitting import THOROUGH, bias_shift, fit_matrix, rest_of
from onnxlr.layers.kernel import as_matrix
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import WeightPass
from onnxlr.methods.choice import Choice, Factored, Factors
from onnxlr.model.graph import constant, float_attr, to_float64
from onnxlr.prepare.expose import session_with_outputs
from onnxlr.prepare.prepared import Prepared
from onnxlr.progress import Progress
from onnxlr.rewrite.builder import Factory
from onnxlr.rewrite.graph import rewrite
from onnxlr.system.session import ONE_CPU_THREAD, Feed
from onnxlr.types import Array

Rows = NDArray[np.float32]

# Of the mean variance of x̂: what the data don't tell about W is left as it was.
_RIDGE = 1e-2
# Weights of ‖z − W̃x̂‖² beside the error behind the Relu, one for each repetition.
_PENALTIES = (0.1, 0.3, 1.0)
_HELD = 256 << 20  # bytes of inputs that are held for it
# Inputs for each of their elements, below which a regression would learn the samples by heart.
_ROWS = 2


def correct(
    prepared: Prepared,
    choices: Mapping[str, Choice],
    factory: Factory,
    feeds: Sequence[Feed],
    seed: int,
    progress: Progress,
    *,
    glance: bool = False,
) -> dict[str, Factored]:
    """Factors for every chosen layer, each fitted behind those before it.

    Parameters
    ----------
    prepared : Prepared
    choices : mapping of str to Choice
        By layer name.
    factory : Factory
        Has the factors of layers whose inputs can't be looked at.
    feeds : sequence of feeds
    seed : int
        Of the positions that are sampled.
    glance : bool
        Whether Relus are passed over: what tells sets apart in a third of the time.
    """
    found: dict[str, Factored] = {}
    layers = [layer for layer in prepared.layers if layer.name in choices]
    with progress.stage("correct in sequence", len(layers)) as step:
        for i, layer in enumerate(layers):
            choice = choices[layer.name]
            plain = factory.factored(layer, choice)
            form = choice.graph_pass.form(layer, choice.rank)
            if i == 0 or form is None or weight_only_reason(layer) is not None:
                found[layer.name] = plain  # nothing before it has changed, or nothing can be told
            elif not isinstance(choice.graph_pass, WeightPass):
                done = {n: choices[n] for n in found}
                pairs = _Pairs(prepared, done, found, layer, feeds, seed, rows=not glance)
                own = factory.statistics.get(layer.name)
                metric = own.metric if own is not None else None
                found[layer.name] = (
                    _fitted(layer, choice, plain, pairs, metric) if pairs.enough else plain
                )
            step(layer.name)
    return found


class _Pairs:
    """Moments of a layer's inputs in the original and in the model as compressed so far.

    There are none where the two don't belong together, or too few tell of them (``enough``).
    """

    @np.errstate(over="ignore", invalid="ignore")  # beyond single precision: see _behind_relu
    def __init__(
        self,
        prepared: Prepared,
        choices: Mapping[str, Choice],
        factors: Mapping[str, Factored],
        layer: Layer,
        feeds: Sequence[Feed],
        seed: int,
        *,
        rows: bool,
    ) -> None:
        names = {use.x.name or "" for use in layer.uses}
        changed = rewrite(
            prepared.model, prepared.shapes, choices, lambda item, *_: factors[item.name]
        )
        before, after = (
            session_with_outputs(model, names, ONE_CPU_THREAD, prepared.source)
            for model in (prepared.model, changed)
        )
        sums = RunningMoments(layer, len(feeds), seed, paired=True)
        bias = bias_before_relu(layer) if rows else None
        step = -(-4 * layer.group * input_size(layer) * sums.row_target // _HELD)
        self.rows: list[tuple[Rows, Rows]] = []  # some of x̂, and of the y that the original had
        weight = as_matrix(layer, layer.array()).astype(np.float32)
        for feed in feeds:
            x = dict(feed) | before.run(feed)
            x_hat = dict(feed) | after.run(feed)
            for use in layer.uses:
                pair = sums.add_pair(use, x_hat[use.x.name or ""], x[use.x.name or ""])
                if bias is not None and pair is not None:
                    given, own = (p[:, ::step].astype(np.float32) for p in pair)
                    y = own @ weight.transpose(0, 2, 1) + bias
                    self.rows.append((given, y))
        self.enough = not sums.shapes_differ and sums.rows >= _ROWS * input_size(layer)
        if self.enough:
            self.given: Statistics = sums.statistics()  # of x̂
            self.mean, self.cross = sums.cross_moments()  # of x, and between x and x̂


def _fitted(
    layer: Layer, choice: Choice, plain: Factored, pairs: _Pairs, metric: Array | None
) -> Factored:
    """Reduced-rank regression of the original's output on the inputs as they are now."""
    weight = as_matrix(layer, layer.array())
    covariance = pairs.given.covariance.copy()
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
        drift = centre - np.einsum("gmn,gn->gm", weight, pairs.given.mean)
        return Factored(stored, bias_shift(rest, pairs.given) + drift.reshape(-1))

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
    pairs: "_Pairs",
    moved: Callable[[Array, Array, Factors], Factored],
) -> Factored:
    """The same for the part of the output that a Relu lets through, as far as it gets better.

    For fixed factors the best z has a closed form, element by element; for fixed z the factors are
    regressed anew. It is told in single precision, as far as that reaches.
    """
    given, y = (np.concatenate(parts, axis=1) for parts in zip(*pairs.rows, strict=True))
    bias = bias_before_relu(layer)
    assert bias is not None
    wanted = np.maximum(y, 0.0)
    weight = as_matrix(layer, layer.array())
    mean = given.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)

    def output(factored: Factored) -> Rows:
        """What the replaced layer gives for these inputs."""
        assert factored.shift is not None
        rest = rest_of(choice.graph_pass, layer, choice.rank, factored.factors)
        small = (weight - rest).astype(np.float32).transpose(0, 2, 1)
        shift = factored.shift.reshape(len(weight), 1, -1).astype(np.float32)
        return np.asarray(given @ small + bias + shift)

    reached = output(best)
    error = float(np.sum(np.square(wanted - np.maximum(reached, 0.0), dtype=np.float64)))
    current = best
    for penalty in _PENALTIES:
        # Only what differs from y is told from the rows at hand: y itself is from all of them.
        change = _let_through(wanted, reached, penalty) - y
        average = change.mean(axis=1, keepdims=True, dtype=np.float64)
        cross = (change - average).transpose(0, 2, 1) @ (given - mean) / given.shape[1]
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
        given = use.node.inputs[2] if len(use.node.inputs) > 2 else None
        known = constant(given)
        if scaled or use.slot == 0 or (given is not None and known is None):
            return None
        outputs = as_matrix(layer, layer.array()).shape[:2]
        bias = np.zeros(outputs) if known is None else to_float64(known)
        if bias.size != math.prod(outputs):
            return None
        biases.append(bias.reshape(outputs[0], 1, -1).astype(np.float32))
    return biases[0] if all(np.array_equal(b, biases[0]) for b in biases) else None
