"""Sequential correction: each layer is fitted to what it is really given, once others have changed.

In graph order the input x̂ of a layer comes from the model as compressed so far, and its factors are
fitted to the output y = W·x that the original had there: reduced-rank regression of y on x̂ (the
"asymmetric" correction of Zhang et al. 2015, arXiv 1505.06798).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from onnxlr.calibrate import Statistics, Sums, exposed, input_size, why_not
from onnxlr.factory import Factory
from onnxlr.fitting import THOROUGH, as_matrix, bias_shift, fit_matrix, rest_of
from onnxlr.graph_pass import WeightPass
from onnxlr.layers import Layer
from onnxlr.prepare import Prepared
from onnxlr.progress import Progress
from onnxlr.rewrite import Choice, Factored, rewrite
from onnxlr.runtime import ONE_CPU_THREAD, Feed

# Of the mean variance of x̂: what the data don't tell about W is left as it was.
_RIDGE = 1e-2
# Inputs for each of their elements, below which a regression would learn the samples by heart.
_ROWS = 4


def correct(
    prepared: Prepared,
    choices: Mapping[str, Choice],
    factory: Factory,
    feeds: Sequence[Feed],
    seed: int,
    progress: Progress,
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
    """
    found: dict[str, Factored] = {}
    layers = [layer for layer in prepared.layers if layer.name in choices]
    with progress.stage("correct in sequence", len(layers)) as step:
        for i, layer in enumerate(layers):
            choice = choices[layer.name]
            plain = factory.factored(layer, choice)
            form = choice.graph_pass.form(layer, choice.rank)
            if i == 0 or form is None or why_not(layer) is not None:
                found[layer.name] = plain  # nothing before it has changed, or nothing can be told
            elif not isinstance(choice.graph_pass, WeightPass):
                done = {n: choices[n] for n in found}
                pairs = _Pairs(prepared, done, found, layer, feeds, seed)
                enough = pairs.given.rows >= _ROWS * input_size(layer)
                found[layer.name] = _fitted(layer, choice, plain, pairs) if enough else plain
            step(layer.name)
    return found


class _Pairs:
    """Moments of a layer's inputs in the original and in the model as compressed so far."""

    def __init__(
        self,
        prepared: Prepared,
        choices: Mapping[str, Choice],
        factors: Mapping[str, Factored],
        layer: Layer,
        feeds: Sequence[Feed],
        seed: int,
    ) -> None:
        names = {use.x.name or "" for use in layer.uses}
        changed = rewrite(
            prepared.model, prepared.shapes, choices, lambda item, *_: factors[item.name]
        )
        before, after = (
            exposed(model, names, ONE_CPU_THREAD, prepared.source.label)
            for model in (prepared.model, changed)
        )
        sums = Sums(layer, len(feeds), seed, paired=True)
        for feed in feeds:
            x = dict(feed) | before.run(feed)
            x_hat = dict(feed) | after.run(feed)
            for use in layer.uses:
                sums.add_pair(use, x_hat[use.x.name or ""], x[use.x.name or ""])
        self.given: Statistics = sums.statistics()  # of x̂
        self.mean, self.cross = sums.other()  # of x, and between x and x̂


def _fitted(layer: Layer, choice: Choice, plain: Factored, pairs: _Pairs) -> Factored:
    """Reduced-rank regression of the original's output on the inputs as they are now."""
    weight = as_matrix(layer, layer.array())
    covariance = pairs.given.covariance.copy()
    n = covariance.shape[1]
    ridge = _RIDGE * np.trace(covariance, axis1=1, axis2=2)[:, None, None] / n + 1e-30
    covariance += ridge * np.eye(n)
    # tr((W − W̃)…) is least for M = (W·C_xx̂ + ε·W)·(C_x̂ + ε)⁻¹, up to what no W̃ can reach.
    right = weight @ (pairs.cross + ridge * np.eye(n))
    target = np.linalg.solve(covariance, right.transpose(0, 2, 1)).transpose(0, 2, 1)
    start = tuple(f.astype(np.float64) for f in plain.factors)
    factors = fit_matrix(choice.graph_pass, layer, choice.rank, target, covariance, THOROUGH, start)
    stored = tuple(f.astype(layer.dtype.numpy()) for f in factors)
    # W·μ − W̃·μ̂: what the factors lose of the new mean, and what the mean itself has moved by.
    rest = rest_of(choice.graph_pass, layer, choice.rank, stored)
    moved = np.einsum("gmn,gn->gm", weight, pairs.mean - pairs.given.mean)
    return Factored(stored, bias_shift(rest, pairs.given) + moved.reshape(-1))
