"""What every candidate of every layer costs, and what it does to the model, both measured."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxlr.allocation import Option, allocate, pareto
from onnxlr.calibrate import Statistics
from onnxlr.candidates import Weighed, front, weigh_layer
from onnxlr.cost import layer_work, weight_error
from onnxlr.errors import ModelError
from onnxlr.factory import Factory
from onnxlr.fits import Candidate, Goal
from onnxlr.fitting import fit_layer, output_error, rest_of
from onnxlr.graph_pass import WeightPass
from onnxlr.latency_table import LatencyTable
from onnxlr.layer_timing import LayerTime
from onnxlr.layers import Layer
from onnxlr.output import save
from onnxlr.plan import Alternative
from onnxlr.prepare import Prepared
from onnxlr.progress import Progress
from onnxlr.rewrite import Choice, Factored, rewrite
from onnxlr.runtime import Session
from onnxlr.store import Store, key_of
from onnxlr.verify import Judge

RANKS = 8  # of each method for a layer
_PROBE = 0.25  # relative output error at which a layer's sensitivity is measured
_LEAST = 1e-7  # below this an error is rounding
_USUAL = 2e7  # parameters read in a millisecond, where nothing can be measured
_PER_PARAMETER = 1e-9  # milliseconds that a parameter is worth: of equally fast the smaller


@dataclass(frozen=True)
class Aim:
    """What is weighed: the methods, what costs count, and whether slower candidates are dropped.

    Attributes
    ----------
    methods : tuple of str
    target : str
        ``latency``, ``macs``, ``params`` or ``bytes``.
    vetoed : bool
        Whether what isn't faster than its layer alone takes no part.
    sensitive : bool
        Whether sensitivities are measured; else an error counts the same everywhere.
    """

    methods: tuple[str, ...]
    target: str
    vetoed: bool
    sensitive: bool = True

    @property
    def goal(self) -> Goal:
        """What a candidate saves."""
        return "params" if self.target in ("params", "bytes") else "macs"

    @property
    def gridded(self) -> bool:
        """Off the hardware's grid a rank takes as long as the next one on it."""
        return self.target == "latency"


@dataclass
class Weighing:
    """Candidates of all layers, with costs in one unit and damages that add up.

    The damage of a candidate is sensitivity × error²: squared errors of independent layers add, and
    a layer's sensitivity is the squared relative error of the model's outputs per squared relative
    error of the layer's own, measured with only that layer replaced.

    Attributes
    ----------
    layers : sequence of Layer
        Those that some method fits.
    judge : Judge
        Of the samples that sensitivities are measured on.
    origin : str
        Digest of the model and the samples: what was found out about them is kept in the store.
    """

    prepared: Prepared
    layers: Sequence[Layer]
    statistics: Mapping[str, Statistics]
    aim: Aim
    judge: Judge
    table: LatencyTable
    factory: Factory
    store: Store
    origin: str
    progress: Progress
    options: dict[str, list[Option]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    times: dict[tuple[str, Choice], LayerTime] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    weighed: dict[str, list[Weighed]] = field(default_factory=dict)

    def weigh(self) -> None:
        """Fill in the options of every layer."""
        with self.progress.stage("weigh candidates", len(self.layers)) as step:
            self._weigh_all(step)
        if self.aim.target == "latency":
            with self.progress.stage("time candidates", len(self.layers)) as step:
                for layer in self.layers:
                    self._time(layer)
                    step(layer.name)
        else:
            for layer in self.layers:
                self._count(layer)
        self._scale_all()

    def allocate(
        self, *, most_damage: float | None = None, most_cost: float | None = None
    ) -> dict[str, Candidate] | None:
        """The cheapest choice within a damage, or the least damaging one within a cost."""
        found = allocate(self.options, self.kept, most_damage=most_damage, most_cost=most_cost)
        return None if found is None else {name: o.candidate for name, o in found.items()}

    def alternatives(self, layer: Layer) -> tuple[Alternative, ...]:
        """All that was weighed for a layer, the most saving last."""
        rows = []
        sensitivity = self.sensitivity.get(layer.name)
        for item in sorted(self.weighed.get(layer.name, ()), key=lambda w: w.candidate.saved):
            choice = item.candidate.choice
            timed = self.times.get((layer.name, choice))
            rows.append(
                Alternative(
                    choice.graph_pass.name,
                    choice.rank,
                    item.candidate.params,
                    item.candidate.macs,
                    item.error,
                    None
                    if sensitivity is None or not math.isfinite(sensitivity)
                    else math.sqrt(sensitivity) * item.error,
                    None if timed is None else timed.before_ms,
                    None if timed is None else timed.after_ms,
                )
            )
        return tuple(rows)

    def _weigh_all(self, step: Any) -> None:
        """The candidates with their errors: those that the store has, and the others."""
        aim = self.aim
        fitted = sorted(self.statistics)
        key = key_of(self.origin, aim.methods, aim.goal, aim.gridded, RANKS, fitted)
        known = self.store.read("candidates", key)
        for layer in self.layers:
            if (row := known.get(layer.name)) is not None:
                found = [Weighed.from_json(layer, aim.goal, item) for item in row["candidates"]]
                self._weighed(layer, found, row["why"])
                step(layer.name)
        missing = [layer for layer in self.layers if layer.name not in known]
        items = [
            (
                *(self.prepared, layer.name, aim.methods, aim.goal, aim.gridded),
                *(self.statistics.get(layer.name), RANKS),
            )
            for layer in missing
        ]
        for layer, (found, why) in zip(
            missing, self.factory.jobs.map(weigh_layer, items), strict=True
        ):
            self._weighed(layer, found, why)
            rows = [item.to_json() for item in found]
            known[layer.name] = {"candidates": rows, "why": why}
            self.store.write("candidates", key, known)
            step(layer.name)

    def _weighed(self, layer: Layer, found: list[Weighed], why: str) -> None:
        self.weighed[layer.name] = found
        if not found:
            self.reasons[layer.name] = why

    def _count(self, layer: Layer) -> None:
        """Options with counted costs; their damage is the squared error for now."""
        size = layer.dtype.itemsize if self.aim.target == "bytes" else 1
        by_work = self.aim.target == "macs"
        self.kept[layer.name] = (layer.macs or 0) if by_work else layer.params * size
        self.options[layer.name] = [
            Option(
                w.candidate,
                (w.candidate.macs or 0) if by_work else w.candidate.params * size,
                w.error**2,
            )
            for w in self.weighed[layer.name]
        ]

    def _time(self, layer: Layer) -> None:
        """Options with measured milliseconds; a little is added for every parameter that is read.

        Where nothing can be measured (a layer in a body) work decides, at a usual speed.
        """
        items = front(self.weighed[layer.name], 1.0)
        chains = [
            w.candidate.choice
            for w in items
            if not isinstance(w.candidate.choice.graph_pass, WeightPass)
        ]
        found = self.table.times(self.prepared.model, layer, chains)
        options, slow, before = [], [], []
        for w in items:
            item = w.candidate
            timed = found.get(item.choice)
            if timed is None:
                stored = isinstance(item.choice.graph_pass, WeightPass)
                share = 1.0 if stored else (item.macs or item.params) / (layer.macs or layer.params)
            else:
                self.times[layer.name, item.choice] = timed
                before.append(timed.before_ms)
                share = timed.after_ms / timed.before_ms
            if timed is None or timed.faster or not self.aim.vetoed:
                options.append((w, share))
                continue
            slow.append(timed.refusal(item.choice))
        # One time for the layer as it is, so that the noise of many measurements doesn't choose.
        whole = float(np.median(before)) if before else self._usual(layer)
        self.kept[layer.name] = whole + _PER_PARAMETER * layer.params
        if slow and not options:
            self.reasons[layer.name] = "; ".join(slow[-2:])
        self.options[layer.name] = [
            Option(w.candidate, share * whole + _PER_PARAMETER * w.candidate.params, w.error**2)
            for w, share in options
        ]

    def _usual(self, layer: Layer) -> float:
        work = layer_work(layer)
        return work.usual_ms if work is not None else layer.params / _USUAL

    def _scale_all(self) -> None:
        """Turn squared errors into damages by the layers' measured sensitivities."""
        asked: dict[str, Choice] = {}
        for layer in self.layers:
            options = pareto(self.options[layer.name], self.kept[layer.name])
            self.options[layer.name] = options
            if options:
                asked[layer.name] = _probe_of(options).choice
        if not self.aim.sensitive:
            self.sensitivity = dict.fromkeys(asked, 1.0)
            return
        with self.progress.stage("measure sensitivities", len(asked)) as step:
            self._measure(asked, step)
        for name in asked:
            sensitivity = self.sensitivity.get(name, math.inf)
            self.options[name] = [
                Option(o.candidate, o.cost, o.damage * sensitivity)
                for o in self.options[name]
                if math.isfinite(sensitivity)
            ]

    def _measure(self, asked: Mapping[str, Choice], step: Any) -> None:
        """Sensitivities: those that the store has, and the others."""
        key = key_of(self.origin, sorted(self.statistics))
        known = self.store.read("sensitivities", key)
        missing = [name for name in asked if name not in known]
        with tempfile.TemporaryDirectory(prefix="onnxlr-") as folder:
            items = [
                (self.prepared, name, asked[name], self.statistics.get(name), self.judge, folder)
                for name in missing
            ]
            for name, found in zip(missing, self.factory.jobs.map(probe, items), strict=True):
                choice = asked[name]
                known[name] = {"method": choice.graph_pass.name, "rank": choice.rank, **found}
                self.store.write("sensitivities", key, known)
                step(name)
        for name in asked:
            row = known[name]
            if "refusal" in row:
                self.reasons[name] = row["refusal"]
            elif row["harm"] is not None:
                self.sensitivity[name] = row["harm"] ** 2 / max(row["error"], _LEAST) ** 2


def probe(
    prepared: Prepared,
    name: str,
    choice: Choice,
    statistics: Statistics | None,
    judge: Judge,
    folder: str,
) -> dict[str, Any]:
    """What one layer's replacement does to the model.

    Returns
    -------
    dict
        ``error``: relative, of the layer's output or, without statistics, of its weight; ``harm``:
        relative error of the model's outputs, None if it isn't finite. Or ``refusal``: why there
        is no such model.
    """
    layer = prepared.layer(name)
    graph_pass, rank = choice.graph_pass, choice.rank
    try:
        factored = fit_layer(prepared, name, choice, statistics)
        harm = harm_of(prepared, {name: choice}, {name: factored}, judge, folder)
    except ModelError as refusal:
        return {"refusal": str(refusal)}
    if statistics is None or isinstance(graph_pass, WeightPass):
        error = weight_error(layer, graph_pass, rank, factored.factors)
    else:
        rest = rest_of(graph_pass, layer, rank, factored.factors)
        error = output_error(layer, rest, statistics)
    return {"error": error, "harm": harm if math.isfinite(harm) else None}


def harm_of(
    prepared: Prepared,
    choices: Mapping[str, Choice],
    factors: Mapping[str, Factored],
    judge: Judge,
    folder: str,
) -> float:
    """Relative error of the model's outputs with these layers replaced.

    Raises
    ------
    ModelError
        If there is no such model.
    """
    model = rewrite(prepared.model, prepared.shapes, choices, lambda layer, *_: factors[layer.name])
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "probe.onnx"
        save(model, path)
        session = Session(path, judge.machine, "the optimized model")
        return judge.judge(session).fidelity.rel_error


def _probe_of(options: Sequence[Option]) -> Candidate:
    """The candidate that sensitivity is measured with."""
    return min(options, key=lambda o: abs(math.log(max(o.damage, _LEAST**2) / _PROBE**2))).candidate
