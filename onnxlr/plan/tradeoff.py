"""What every candidate of every layer costs, and what it does to the model, both measured."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.errors import Weighed, front, weigh_layer
from onnxlr.candidates.fits import Candidate, Goal
from onnxlr.candidates.spectra import DECOMPOSING
from onnxlr.errors import UsageError
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import WeightPass
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import layer_work
from onnxlr.plan.knapsack import Option, allocate, pareto
from onnxlr.plan.plan import Alternative
from onnxlr.plan.sensitivity import LEAST, Sensitivity, is_probe, probe
from onnxlr.prepare.prepared import Prepared
from onnxlr.progress import Progress
from onnxlr.rewrite.builder import Factory
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.files import scratch
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency_table import LatencyTable
from onnxlr.verify.layer_latency import CRASHED, LayerTime

RANKS = 8  # of each method for a layer
# Relative output errors at which a layer's sensitivity is measured, and where time is short.
PROBES: tuple[float, ...] = (0.1, 0.25, 0.6)
FEW_PROBES: tuple[float, ...] = (0.25,)
_USUAL = 2e7  # parameters read in a millisecond, where nothing can be measured
_MODELS = 6  # of the model's size, that a process takes which runs it beside another
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
    probes : tuple of float
        Errors at which sensitivities are measured; with none, an error counts the same everywhere.
    by_classes : bool
        Whether divergences of the class probabilities count, instead of the outputs' errors.
    """

    methods: tuple[str, ...]
    target: str
    vetoed: bool
    probes: tuple[float, ...] = PROBES
    by_classes: bool = False

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

    The damage of a candidate is its layer's sensitivity × error²: the squared relative error of the
    model's outputs, or the divergence of its class probabilities, with only that layer replaced.
    Of independent layers, such damages add.

    Attributes
    ----------
    layers : sequence of Layer
        Those that some method fits.
    judge : Judge
        Of the samples that sensitivities are measured on.
    origin : str
        Digest of the model and the samples: what was found out about them is kept in the cache.
    """

    prepared: Prepared
    layers: Sequence[Layer]
    statistics: Mapping[str, Statistics]
    aim: Aim
    judge: Judge
    table: LatencyTable
    factory: Factory
    cache: Cache
    origin: str
    progress: Progress
    options: dict[str, list[Option]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    sensitivity: dict[str, Sensitivity] = field(default_factory=dict)
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
                    with contextlib.suppress(OSError):  # told at the end, where it counts
                        self.table.save()  # now: a run that is killed has paid for it
                    step(layer.name)
        else:
            for layer in self.layers:
                self._count(layer)
        self._scale_all()

    def allocate(
        self,
        *,
        most_damage: float | None = None,
        most_cost: float | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, Candidate] | None:
        """The cheapest choice within a damage, or the least damaging one within a cost.

        The damage of a layer counts as often as its weight says, else once.
        """
        options: Mapping[str, Sequence[Option]] = self.options
        if weights:
            options = {
                name: [replace(o, damage=o.damage * weights.get(name, 1.0)) for o in rows]
                for name, rows in options.items()
            }
        found = allocate(options, self.kept, most_damage=most_damage, most_cost=most_cost)
        return None if found is None else {name: o.candidate for name, o in found.items()}

    def cost(self, chosen: Mapping[str, Candidate]) -> float:
        """What the layers cost with these replaced, in the unit of the budget."""
        return sum(
            next((o.cost for o in self.options.get(name, ()) if o.candidate == chosen.get(name)), k)
            for name, k in self.kept.items()
        )

    def predicted(self, chosen: Mapping[str, Candidate]) -> dict[str, float]:
        """The damage that is predicted for every layer that has options, 0 where it is kept."""
        return {
            name: next((o.damage for o in rows if o.candidate == chosen.get(name)), 0.0)
            for name, rows in self.options.items()
            if rows
        }

    def alternatives(self, layer: Layer) -> tuple[Alternative, ...]:
        """All that was weighed for a layer, the most saving last."""
        rows = []
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
                    self.harm(layer.name, item.error),
                    None if timed is None else timed.before_ms,
                    None if timed is None else timed.after_ms,
                )
            )
        return tuple(rows)

    def harm(self, name: str, error: float) -> float | None:
        """Predicted relative error of the model's outputs for an error of this layer's."""
        found = self.sensitivity.get(name)
        harm = math.inf if found is None else found.harm(error)
        return harm if math.isfinite(harm) else None

    def _weigh_all(self, step: Any) -> None:
        """The candidates with their errors: those that the cache has, and the others."""
        aim = self.aim
        fitted = [(n, s.metric is not None) for n, s in sorted(self.statistics.items())]
        key = key_of(self.origin, aim.methods, aim.goal, aim.gridded, RANKS, fitted)
        known = self.cache.read("candidates", key)
        for layer in self.layers:
            if (kept := self._kept(layer, known.get(layer.name))) is not None:
                self._weighed(layer, *kept)
                step(layer.name)
        missing = [layer for layer in self.layers if layer.name not in self.weighed]
        items = [
            (
                *(layer.name, aim.methods, aim.goal, aim.gridded),
                *(self.statistics.get(layer.name), RANKS),
            )
            for layer in missing
        ]
        needs = DECOMPOSING * max((layer.params for layer in missing), default=0)
        results = self.factory.pool.map(weigh_layer, items, self.prepared, needs=needs)
        for layer, (found, why) in zip(missing, results, strict=True):
            self._weighed(layer, found, why)
            rows = [item.to_json() for item in found]
            known[layer.name] = {"candidates": rows, "why": why}
            self.cache.write("candidates", key, known)
            step(layer.name)

    def _kept(self, layer: Layer, row: Any) -> tuple[list[Weighed], str] | None:
        """What the cache has of a layer; None where it has nothing, or what nobody here wrote."""
        try:
            found = [Weighed.from_json(layer, self.aim.goal, item) for item in row["candidates"]]
        except (LookupError, TypeError, ValueError, UsageError):
            return None
        return (found, row["why"]) if isinstance(row.get("why"), str) else None

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
                share = 1.0 if stored else _share_of_work(layer, item)
            elif timed is CRASHED:
                slow.append(timed.refusal(item.choice))
                continue
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
        asked: dict[str, list[Choice]] = {}
        for layer in self.layers:
            options = pareto(self.options[layer.name], self.kept[layer.name])
            if self.options[layer.name] and not options:
                self.reasons.setdefault(
                    layer.name, f"no rank of any method saves {self.aim.target} here"
                )
            self.options[layer.name] = options
            if options:
                asked[layer.name] = _probes_of(options, self.aim.probes)
        if self.aim.probes:
            with self.progress.stage("measure sensitivities", len(asked)) as step:
                self._measure(asked, step)
        else:
            self.sensitivity = {name: Sensitivity() for name in asked}
        for name, sensitivity in self.sensitivity.items():
            # Until now damages are squared errors.
            losses = [(o, sensitivity.loss(math.sqrt(o.damage))) for o in self.options[name]]
            self.options[name] = [
                replace(o, damage=loss) for o, loss in losses if math.isfinite(loss)
            ]
            if not self.options[name]:
                self.reasons.setdefault(
                    name, "without it, or with little of it, the model's outputs aren't finite"
                )

    def _measure(self, asked: Mapping[str, list[Choice]], step: Any) -> None:
        """Sensitivities: those that the cache has, and the others."""
        fitted = [(n, s.metric is not None) for n, s in sorted(self.statistics.items())]
        key = key_of(self.origin, fitted)
        known = self.cache.read("sensitivities", key)
        missing = [
            (name, choice)
            for name, some in asked.items()
            for choice in some
            if not is_probe(known.get(_label(name, choice)))
        ]
        left = {name: sum(n == name for n, _ in missing) for name in asked}
        with scratch(self.factory.folder.parent, "probes-") as folder:
            items = [(name, choice, self.statistics.get(name)) for name, choice in missing]
            found = self.factory.pool.map(
                probe,
                items,
                *(self.prepared, self.judge, folder),
                needs=_MODELS * self.prepared.source.nbytes,
            )
            for (name, choice), row in zip(missing, found, strict=True):
                known[_label(name, choice)] = row
                self.cache.write("sensitivities", key, known)
                left[name] -= 1
                if not left[name]:
                    step(name)
        for name, some in asked.items():
            rows = [known[_label(name, choice)] for choice in some]
            told = [row for row in rows if "refusal" not in row]
            if told:
                self.sensitivity[name] = Sensitivity.from_probes(
                    told, by_classes=self.aim.by_classes
                )
            else:
                self.reasons[name] = rows[0]["refusal"]
                self.options[name] = []


def _share_of_work(layer: Layer, item: Candidate) -> float:
    """What a candidate does of a layer's work; of its reading, where that does none."""
    if layer.macs and item.macs is not None:
        return item.macs / layer.macs
    return item.params / layer.params


def _label(name: str, choice: Choice) -> str:
    ranks = "-".join(map(str, choice.rank))
    return f"{name} {choice.graph_pass.name} {ranks}"


def _probes_of(options: Sequence[Option], errors: Sequence[float]) -> list[Choice]:
    """The candidates that sensitivity is measured with: those nearest to some errors."""
    nearest = [
        min(options, key=lambda o: abs(math.log(max(o.damage, LEAST**2) / error**2)))
        for error in errors
    ]
    return list(dict.fromkeys(option.candidate.choice for option in nearest))
