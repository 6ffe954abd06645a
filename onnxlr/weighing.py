"""What every candidate of every layer costs, and what it does to the model, both measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxlr.allocation import Option, pareto
from onnxlr.calibrate import Statistics, input_size
from onnxlr.cost import weight_error
from onnxlr.errors import ModelError
from onnxlr.factory import Factory
from onnxlr.fitting import GLANCE, WIDE, closed_errors, closes, fit_to_inputs, output_error, rest_of
from onnxlr.graph_pass import Array, WeightPass
from onnxlr.layer_timing import LayerTime, LayerTimer
from onnxlr.layers import Layer
from onnxlr.plan import AUTO_ERRORS, Candidate, Fit, Goal, auto_candidates
from onnxlr.prepare import Prepared
from onnxlr.progress import Progress
from onnxlr.runtime import Machine, Session
from onnxlr.verify import Judge

_PROBE = 0.25  # relative output error at which a layer's sensitivity is measured
_RANKS = 8  # of each method for a layer
_GAIN = 0.85  # what fitting usually leaves of an error, where it would take too long to see
_SLACK = 1.4  # fitting brings errors down by less than this
_LEAST = 1e-7  # below this an error is rounding
_USUAL = 2e7  # multiply-accumulates in a millisecond, where nothing can be measured
_PER_PARAMETER = 1e-9  # milliseconds that a parameter is worth: of equally fast the smaller


@dataclass(frozen=True)
class Weighed:
    """A candidate with the relative error of the layer's output that it would make."""

    candidate: Candidate
    error: float


@dataclass
class Weighing:
    """Candidates of all layers, with costs in one unit and damages that add up.

    The damage of a candidate is sensitivity × error²: squared errors of independent layers add, and
    a layer's sensitivity is the squared relative error of the model's outputs per squared relative
    error of the layer's own, measured with only that layer replaced.

    Attributes
    ----------
    goal : str
        What costs count: ``latency``, ``macs``, ``params`` or ``bytes``.
    judge : Judge
        Of the samples that sensitivities are measured on.
    """

    prepared: Prepared
    fits: Mapping[str, Sequence[Fit]]
    statistics: Mapping[str, Statistics]
    factory: Factory
    goal: str
    machine: Machine
    judge: Judge
    progress: Progress
    vetoed: bool
    options: dict[str, list[Option]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    times: dict[tuple[str, Candidate], LayerTime] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def weigh(self) -> None:
        """Fill in the options of every layer."""
        timer = LayerTimer(self.machine)
        layers = [layer for layer in self.prepared.layers if self.fits[layer.name]]
        with self.progress.stage("weigh candidates", len(layers)) as step:
            for layer in layers:
                self.kept[layer.name] = self._cost_of_layer(layer)
                weighed = self._candidates(layer)
                if weighed:
                    self.options[layer.name] = self._costs(layer, weighed, timer)
                step(layer.name)
        with self.progress.stage("measure sensitivities", len(self.options)) as step:
            for layer in layers:
                if self.options.get(layer.name):
                    self._scale(layer)
                    step(layer.name)

    def _candidates(self, layer: Layer) -> list[Weighed]:
        goal: Goal = "params" if self.goal in ("params", "bytes") else "macs"
        # Off the hardware's grid a rank takes as long as the next one on it.
        gridded = self.goal == "latency"
        found: list[Candidate] = []
        why = ""
        for fit in self._worthwhile(layer):
            ranks: dict[Candidate, None] = {}
            for error in AUTO_ERRORS:
                some = auto_candidates(layer, (fit,), error, goal, gridded=gridded)
                if isinstance(some, list):
                    ranks.update(dict.fromkeys(some))
                elif not found:
                    why = some
            found += _thinned(list(ranks))
        if not found:
            self.reasons[layer.name] = why
            return []
        statistics = self.statistics.get(layer.name)
        if statistics is None:
            return [Weighed(item, self._weight_error(layer, item)) for item in found]
        return self._fitted(layer, found, statistics)

    def _worthwhile(self, layer: Layer) -> Sequence[Fit]:
        """The methods without those that another makes superfluous whatever the rank."""
        fits = self.fits[layer.name]
        if layer.name not in self.statistics or math.prod(layer.shape[2:]) > 1:
            return fits
        # A matrix has one best approximation of a rank, and a closed form that gives it.
        best = [f for f in fits if closes(f.graph_pass, layer, f.full)]
        rest = [f for f in fits if isinstance(f.graph_pass, WeightPass)]
        return [*best[:1], *rest] if best else fits

    def _weight_error(self, layer: Layer, item: Candidate) -> float:
        graph_pass, rank = item.choice.graph_pass, item.choice.rank
        return weight_error(layer, graph_pass, rank, graph_pass.factorize(layer, rank))

    def _fitted(
        self, layer: Layer, found: list[Candidate], statistics: Statistics
    ) -> list[Weighed]:
        """The candidates with the output errors that fitting leaves."""
        told: dict[str, Array | None] = {}
        done, plain, starts = [], [], {}
        for item in found:
            graph_pass, rank = item.choice.graph_pass, item.choice.rank
            if isinstance(graph_pass, WeightPass):
                done.append(Weighed(item, self._weight_error(layer, item)))
                continue
            if graph_pass.name not in told:
                told[graph_pass.name] = closed_errors(graph_pass, layer, statistics)
            if (errors := told[graph_pass.name]) is not None:
                done.append(Weighed(item, float(errors[min(rank[0], len(errors) - 1)])))
                continue
            starts[item] = graph_pass.factorize(layer, rank)
            rest = rest_of(graph_pass, layer, rank, starts[item])
            plain.append(Weighed(item, output_error(layer, rest, statistics)))
        # Fitting is dear: only what isn't far behind another of the same cost is fitted.
        if input_size(layer) > WIDE:
            return [*done, *(Weighed(w.candidate, w.error * _GAIN) for w in plain)]
        for weighed in _front([*done, *plain], _SLACK):
            item = weighed.candidate
            if item in starts:
                graph_pass, rank = item.choice.graph_pass, item.choice.rank
                factors = fit_to_inputs(graph_pass, layer, rank, statistics, GLANCE, starts[item])
                rest = rest_of(graph_pass, layer, rank, factors)
                done.append(Weighed(item, output_error(layer, rest, statistics)))
        return done

    def _cost_of_layer(self, layer: Layer) -> float:
        if self.goal == "params":
            return layer.params
        if self.goal == "bytes":
            return layer.params * layer.dtype.itemsize
        return layer.macs or 0

    def _costs(self, layer: Layer, weighed: list[Weighed], timer: LayerTimer) -> list[Option]:
        """Options with their costs; their damage is the squared error for now."""
        if self.goal != "latency":
            size = layer.dtype.itemsize if self.goal == "bytes" else 1
            by_work = self.goal == "macs"
            return [
                Option(
                    w.candidate,
                    (w.candidate.macs or 0) if by_work else w.candidate.params * size,
                    w.error**2,
                )
                for w in weighed
            ]
        return self._times(layer, weighed, timer)

    def _times(self, layer: Layer, weighed: list[Weighed], timer: LayerTimer) -> list[Option]:
        """Options with measured milliseconds; a little is added for every parameter that is read.

        Where nothing can be measured (a layer in a body) work decides, at a usual speed.
        """
        usual = max(layer.macs or 0, layer.params) / _USUAL
        options, slow, before = [], [], []
        for w in _front(weighed, 1.0):
            item = w.candidate
            stored = isinstance(item.choice.graph_pass, WeightPass)
            timed = None if stored else timer.time(self.prepared.model, layer, item.choice)
            if timed is None:
                share = 1.0 if stored else (item.macs or item.params) / (layer.macs or layer.params)
            else:
                self.times[layer.name, item] = timed
                before.append(timed.before_ms)
                share = timed.after_ms / timed.before_ms
            if timed is None or timed.faster or not self.vetoed:
                options.append((w, share))
                continue
            slow.append(timed.refusal(item.choice))
        # One time for the layer as it is, so that the noise of many measurements doesn't choose.
        whole = float(np.median(before)) if before else usual
        self.kept[layer.name] = whole + _PER_PARAMETER * layer.params
        if not options:
            self.reasons[layer.name] = "; ".join(slow[-2:])
        return [
            Option(w.candidate, share * whole + _PER_PARAMETER * w.candidate.params, w.error**2)
            for w, share in options
        ]

    def _scale(self, layer: Layer) -> None:
        """Turn squared errors into damages by the layer's measured sensitivity."""
        options = pareto(self.options[layer.name], self.kept[layer.name])
        if not options:
            return
        probe = min(options, key=lambda o: abs(math.log(max(o.damage, _LEAST**2) / _PROBE**2)))
        choice = probe.candidate.choice
        try:
            built = self.factory.build({layer.name: choice})
            quality = self.judge.judge(Session(built.path, self.machine, "the optimized model"))
            harm = quality.fidelity.rel_error**2
        except ModelError as refusal:
            self.reasons[layer.name] = str(refusal)
            self.options[layer.name] = []
            return
        own = self.factory.output_error(layer, choice)
        error = max(own if own is not None else math.sqrt(probe.damage), _LEAST)
        self.sensitivity[layer.name] = harm / error**2 if math.isfinite(harm) else math.inf
        self.options[layer.name] = [
            Option(o.candidate, o.cost, o.damage * self.sensitivity[layer.name])
            for o in options
            if math.isfinite(self.sensitivity[layer.name])
        ]


def _thinned(found: list[Candidate]) -> list[Candidate]:
    """Some of many, spread evenly from the mildest to the boldest."""
    if len(found) <= _RANKS:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, _RANKS).astype(int)]


def _front(weighed: Sequence[Weighed], slack: float) -> list[Weighed]:
    """Those whose error is within a factor of the best at the same work or less."""
    ordered = sorted(weighed, key=lambda w: (-w.candidate.saved, w.error))
    kept, best = [], math.inf
    for item in ordered:
        if item.error < best * slack:
            kept.append(item)
        best = min(best, item.error)
    return kept
