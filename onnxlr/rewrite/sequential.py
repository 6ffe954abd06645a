"""Sequential correction: each layer is fitted to the inputs that the layers before it now give.

In graph order the input x̂ of a layer comes from the model as compressed so far, and its factors are
fitted to the output y = W·x that the original had there: reduced-rank regression of y on x̂ (the
"asymmetric" correction of Zhang et al. 2015, arXiv 1505.06798). Where a Relu follows, what counts
is what it lets through: y is replaced by the z that costs least there, and the regression repeated.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from onnxlr.calibrate.statistics import Statistics, weight_only_reason
from onnxlr.candidates.fitting import THOROUGH, bias_shift, fit_matrix, rest_of
from onnxlr.layers.kernel import as_matrix
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice, Factored, Factors
from onnxlr.prepare.originals import Originals
from onnxlr.prepare.prefix import Prefix
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Progress
from onnxlr.rewrite.pairs import Pairs, Rows, bias_before_relu, pairs_of
from onnxlr.rewrite.variant import Variant
from onnxlr.types import Array

# Weights of ‖z − W̃x̂‖² beside the error behind the Relu, one for each repetition.
_PENALTIES = (0.1, 0.3, 1.0)


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
    choices, so_far = plain.choices, Prefix(prepared.source, samples)
    corrected: dict[str, Factored] = {}
    layers = [layer for layer in prepared.layers if layer.name in choices]
    with progress.stage("correct in sequence", len(layers)) as step, _helper(processes) as helper:
        for layer in layers:
            choice, factored = choices[layer.name], plain.factors[layer.name]
            form = choice.graph_pass.form(layer)
            # Before the first of them nothing has changed; without a form nothing can be fitted.
            # What is looked up is no sum that inputs could change, and bodies are left as they are.
            inner = any(use.inner for use in layer.uses)
            fitted = form is not None and layer.kind != "gather" and not inner
            if corrected and fitted and weight_only_reason(layer) is None:
                before = {name: choices[name] for name in corrected}
                pairs = pairs_of(
                    *(prepared, before, corrected, layer, samples, originals),
                    *(so_far, seed, helper),
                    rows=not glance,
                )
                if pairs is not None:
                    moments = statistics.get(layer.name)
                    metric = moments.metric if moments is not None else None
                    factored = _fitted(layer, choice, factored, pairs, metric)
            corrected[layer.name] = factored
            step(layer.name)
    return replace(plain, factors=corrected, sequential=len(samples))


@contextlib.contextmanager
def _helper(processes: int) -> Iterator[Executor | None]:
    """A thread that works beside this one, if more than one process may work."""
    if processes == 1:
        yield None
        return
    with ThreadPoolExecutor(1) as helper:
        yield helper


def _fitted(
    layer: Layer, choice: Choice, plain: Factored, pairs: Pairs, metric: Array | None
) -> Factored:
    """Reduced-rank regression of the original's output on the inputs as they are now."""
    weight = as_matrix(layer, layer.array())

    def regressed(target: Array, start: Factors, centre: Array) -> Factored:
        """Factors for a regression and a mean of y, with the shift of the bias that goes along."""
        doubles = tuple(f.astype(np.float64) for f in start)
        factors = fit_matrix(
            choice.graph_pass, layer, choice.rank, target, pairs.moments, metric, THOROUGH, doubles
        )
        stored = tuple(f.astype(layer.dtype.numpy()) for f in factors)
        # ȳ − W·μ̂ is what the mean itself has moved by, W·μ̂ − W̃·μ̂ what the factors lose of it.
        rest = rest_of(choice.graph_pass, layer, choice.rank, stored)
        drift = centre - np.einsum("gmn,gn->gm", weight, pairs.mean)
        return Factored(stored, bias_shift(rest, pairs.mean) + drift.reshape(-1))

    best = regressed(pairs.target(None), plain.factors, pairs.centre)
    if pairs.wanted is None:
        return best
    return _behind_relu(layer, choice, best, pairs, regressed)


@np.errstate(over="ignore", invalid="ignore")
def _behind_relu(
    layer: Layer,
    choice: Choice,
    best: Factored,
    pairs: Pairs,
    regressed: Callable[[Array, Factors, Array], Factored],
) -> Factored:
    """The same for the part of the output that a Relu lets through, as far as it gets better.

    For fixed factors the best z has a closed form, element by element; for fixed z the factors are
    regressed anew. It is told in single precision, as far as that reaches.
    """
    y, bias = pairs.wanted, bias_before_relu(layer)
    assert y is not None
    assert bias is not None
    wanted = np.maximum(y, 0.0)
    weight = as_matrix(layer, layer.array())

    def output(factored: Factored) -> Rows:
        """What the replaced layer gives for these inputs."""
        assert factored.shift is not None
        rest = rest_of(choice.graph_pass, layer, choice.rank, factored.factors)
        shift = factored.shift.reshape(len(weight), 1, -1).astype(np.float32)
        return np.asarray(pairs.outputs(weight - rest) + bias + shift)

    reached = output(best)
    error = float(np.sum(np.square(wanted - np.maximum(reached, 0.0), dtype=np.float64)))
    current = best
    for penalty in _PENALTIES:
        change = _let_through(wanted, reached, penalty) - y
        target, average = pairs.target(change), change.mean(axis=1, dtype=np.float64)
        if not (np.isfinite(target).all() and np.isfinite(average).all()):
            break
        current = regressed(target, current.factors, pairs.centre + average)
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
