"""Choosing a method and a rank for every layer: as named, within a budget, or boldly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from onnxlr.calibrate.budget import calibration_samples, sample_seconds
from onnxlr.candidates.fits import (
    UNVERIFIED_AUTO_ERROR,
    Candidate,
    Fit,
    Goal,
    auto_candidates,
    named_candidates,
)
from onnxlr.errors import BudgetError, ModelError
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import count_macs
from onnxlr.methods.base import WeightPass
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import chain_macs, layer_work
from onnxlr.model.graph import count_params
from onnxlr.plan.evaluate import Assessor
from onnxlr.plan.search import Chosen, Trials, boldest, choices_of, least_damaging
from onnxlr.plan.tradeoff import FEW_PROBES, PROBES, Aim, Weighing
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.rewrite.builder import Built
from onnxlr.system.cache import Cache, key_of
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency_table import LatencyTable
from onnxlr.verify.layer_latency import CRASHED, LayerTime

PROBED_SAMPLES = 64  # that sensitivities are measured on, where half a second is enough
_PROBE_SECONDS, _FEWEST_PROBED = 0.5, 24
# Predicted squared relative errors of the model's outputs, among which a search bisects.
DAMAGES = tuple(float(d) for d in np.logspace(-5, 0.5, 23))
_BOLDER = 2  # further levels that are tried with sequential correction
_CORRECTIONS = 5  # of a budget that the written file misses
# Sets of equal cost that are measured as a whole, and what is spent on it.
_MOST_REFINED, _FEWEST_REFINED, _REFINED_ON, _REFINING_SECONDS = 24, 8, 2048, 160.0
_BOLDEST_ERROR = 0.9  # of a weight, where there is no limit

# Of the methods that fit a layer at a level, how many of the most saving are timed.
_TIMED_METHODS = 3


@dataclass
class Choosing:
    """Chooses for the layers that some method fits.

    Attributes
    ----------
    fits : mapping of str to sequence of Fit
        By layer name.
    kept : dict of str to str
        Why layers stay as they are, as far as it is known.
    table : LatencyTable or None
        None where nothing runs.
    times : dict of (str, Choice) to LayerTime
    named : dict of str to sequence of Candidate
        What a named rank gave.
    weighing : Weighing or None
        None where ranks are named, or nothing is judged.
    """

    assessor: Assessor
    fits: Mapping[str, Sequence[Fit]]
    kept: dict[str, str]
    table: LatencyTable | None
    cache: Cache
    times: dict[tuple[str, Choice], LayerTime] = field(default_factory=dict)
    named: dict[str, Sequence[Candidate]] = field(default_factory=dict)
    weighing: Weighing | None = None

    def __post_init__(self) -> None:
        self.options, self.prepared = self.assessor.options, self.assessor.prepared
        self.factory, self.progress = self.assessor.factory, self.assessor.progress

    def choose(self) -> Chosen:
        """The boldest candidates that the accuracy limit allows on the saved file."""
        if self.options.rank.kind == "auto" and self.assessor.judge is not None:
            self._weigh(self.assessor.judge)
            if self.options.fraction is not None:
                return self._meet(self.options.fraction)
            levels: list[Callable[[], Chosen]] = [partial(self._allocated, d) for d in DAMAGES]
        else:
            levels = [self._as_named]
        with self.progress.stage("choose and verify", None) as step:

            def verdict(chosen: Mapping[str, Candidate]) -> str | None:
                step(f"trial of {len(chosen)} layers")
                return self._verdict(chosen)

            found = boldest(levels, Trials(verdict))
        self.kept |= found.refused
        return self._bolder(found.chosen)

    def _bolder(self, chosen: Chosen) -> Chosen:
        """Further levels of damage that only sequential correction brings within the limit."""
        if self.weighing is None or not self.assessor.corrects(choices_of(chosen)):
            return chosen
        saved = sum(c.saved for c in chosen.values())
        tried = 0
        for damage in DAMAGES:
            more = self._allocated(damage)
            if sum(c.saved for c in more.values()) <= saved or more == chosen:
                continue
            if tried == _BOLDER or self._improved_over(more) is not None:
                break
            tried, chosen, saved = tried + 1, more, sum(c.saved for c in more.values())
        return chosen

    def _improved_over(self, chosen: Chosen) -> str | None:
        """Why a set is outside the limit although it was corrected in sequence."""
        return self.assessor.over(self.assessor.improved(choices_of(chosen)))

    def _weigh(self, judge: Judge) -> None:
        """Weigh all candidates; sensitivities come from samples that don't judge the result."""
        session, feeding, table = self.assessor.session, self.assessor.feeding, self.table
        assert session is not None
        assert feeding is not None
        assert table is not None
        options, probed, probes = self.options, judge, FEW_PROBES
        samples = feeding.calibration
        origin: list[object] = [self.prepared.source.digest, self.prepared.input_shapes]
        if samples is not None:
            affordable = int(_PROBE_SECONDS / sample_seconds(self.prepared))
            probes = PROBES if affordable >= PROBED_SAMPLES else FEW_PROBES
            taken = samples.take(min(PROBED_SAMPLES, max(_FEWEST_PROBED, affordable)))
            origin += [calibration_samples(self.prepared, samples).digest(), taken.digest()]
            with self.progress.stage("run the original", None):
                probed = Judge(session, taken, "rel-error")
        passes = {f.graph_pass.name: None for fits in self.fits.values() for f in fits}
        self.weighing = Weighing(
            self.prepared,
            [layer for layer in self.prepared.layers if self.fits[layer.name]],
            self.factory.statistics,
            Aim(
                tuple(passes),
                options.goal,
                options.latency_vetoes,
                () if "sensitivity" in options.without else probes,
                self.assessor.by_classes,
            ),
            probed,
            table,
            self.factory,
            self.cache,
            key_of(*origin, options.seed, options.machine),
            self.progress,
        )
        self.weighing.weigh()
        self.times |= self.weighing.times
        self.kept |= self.weighing.reasons

    def _allocated(self, damage: float) -> Chosen:
        """The cheapest choice within a predicted damage."""
        weighing = self.weighing
        assert weighing is not None
        return weighing.allocate(most_damage=damage) or {}

    def _meet(self, fraction: float) -> Chosen:
        """The least damaging choice within a budget, counted or measured on the saved file.

        Raises
        ------
        BudgetError
            If there is none, or it is outside the accuracy limit.
        """
        weighing, goal = self.weighing, self.options.goal
        assert weighing is not None
        assert self.assessor.judge is not None
        total = self._total(goal)
        others = total - sum(weighing.kept.values())
        budget = fraction * total - others
        least = others + sum(
            min((o.cost for o in weighing.options.get(name, ())), default=kept)
            for name, kept in weighing.kept.items()
        )
        asked = f"--target {goal}={fraction:g}"
        for _ in range(_CORRECTIONS):
            chosen = weighing.allocate(most_cost=budget)
            if chosen is None:
                raise BudgetError(
                    f"{asked} can't be met: the boldest candidates leave {least / total:.0%} of "
                    f"the model's {goal}; allow more, or more methods"
                )
            with self.progress.stage(f"verify {len(chosen)} replaced layers", None):
                built = self.factory.build(choices_of(chosen))
                cost = self._cost(goal, total, built, chosen)
            most = fraction * total * (1 + 1e-9)
            if cost <= most:
                refined = self._refined(chosen, budget)
                built = self.factory.build(choices_of(refined))
                if refined != chosen and self._cost(goal, total, built, refined) <= most:
                    chosen = refined
                if (why := self._improved_over(chosen)) is not None:
                    raise BudgetError(f"{asked} is outside the accuracy allowed: {why}")
                return chosen
            # Names, nodes and biases take their share too; what this choice left free was theirs.
            budget = min(budget, weighing.cost(chosen)) - (cost - fraction * total)
        raise BudgetError(f"{asked} can't be met: {cost / total:.2%} is the nearest that was found")

    def _refined(self, chosen: Chosen, budget: float) -> Chosen:
        """The least damaging set near one that the budget leads to, measured on what judges."""
        weighing, assessor = self.weighing, self.assessor
        assert weighing is not None
        if assessor.feeding is None or not isinstance(assessor.feeding.validation, Samples):
            return chosen
        samples = 0
        seconds = len(assessor.feeding.validation) * sample_seconds(self.prepared)
        if assessor.corrects(choices_of(chosen)):
            some = min(assessor.samples, _REFINED_ON)
            longer = seconds + assessor.correction_seconds(some)
            if longer * _FEWEST_REFINED <= _REFINING_SECONDS:
                samples, seconds = some, longer
        most = min(_MOST_REFINED, int(_REFINING_SECONDS / seconds))
        if most < _FEWEST_REFINED:
            return chosen
        named = weighing.predicted(chosen)
        with self.progress.stage("weigh layers against each other", most) as step:

            def damage(item: Chosen) -> float:
                step(f"{len(item)} layers")
                return assessor.damage(choices_of(item), samples)

            return least_damaging(
                chosen,
                sorted(named, key=lambda n: -named[n]),
                lambda weights: weighing.allocate(most_cost=budget, weights=weights),
                damage,
                most,
            )

    def _total(self, goal: str) -> float:
        """What the original costs as a whole."""
        if goal == "latency":
            if not self.assessor.timed:
                return self._estimated_total()
            return self.assessor.original_ms()
        if goal == "macs":
            return count_macs(self.prepared.model, self.prepared.shapes)
        source = self.prepared.source
        return source.nbytes if goal == "bytes" else count_params(source.model)

    def _estimated_total(self) -> float:
        """Milliseconds of all layers, those without candidates at a usual speed."""
        assert self.weighing is not None
        rest = [
            work.usual_ms
            for layer in self.prepared.layers
            if layer.name not in self.weighing.kept and (work := layer_work(layer)) is not None
        ]
        return sum(self.weighing.kept.values()) + sum(rest)

    def _cost(self, goal: str, total: float, built: Built, chosen: Chosen) -> float:
        """What a built model costs as a whole, where the original costs ``total``."""
        if goal == "latency":
            if not self.assessor.timed:
                return total - sum(self.saved_ms(n, c) or 0.0 for n, c in chosen.items())
            return total / self.assessor.compare(built).speedup
        if goal == "macs":
            return total - saved_macs(self.prepared, chosen)
        return built.nbytes if goal == "bytes" else built.params

    def _as_named(self) -> Chosen:
        """The set of replacements at the named ranks, or at a cautious error where nothing runs."""
        sized = self.options.target in ("params", "bytes") or self.options.expand_at_load
        goal: Goal = "params" if sized else "macs"
        chosen: Chosen = {}
        for layer in self.prepared.layers:
            fits = self.fits[layer.name]
            if not fits:
                continue
            found = (
                auto_candidates(layer, fits, self._cautious_error(), goal)
                if self.options.rank.kind == "auto"
                else named_candidates(layer, fits, self.options.rank, goal)
            )
            if isinstance(found, list):
                self.named[layer.name] = found
            if isinstance(found, list) and self.options.target == "macs":
                fewer = [c for c in found if (c.macs or 0) <= (layer.macs or 0)]
                found = fewer or "a lookup has no MACs, its replacement would add some"
            if isinstance(found, list) and self.options.latency_vetoes:
                found = self._fastest(layer, found)
            if isinstance(found, str):
                self.kept[layer.name] = found
            else:
                chosen[layer.name] = found[0]
        return chosen

    def _cautious_error(self) -> float:
        """Of a weight, where the whole model isn't judged."""
        if self.options.verify == "layers":
            return min(max(self.options.max_drop, 1e-6), _BOLDEST_ERROR)
        return UNVERIFIED_AUTO_ERROR

    def _fastest(self, layer: Layer, found: Sequence[Candidate]) -> list[Candidate] | str:
        """The candidates that are measurably faster than the layer alone, fastest first.

        Those that only store factors come after them: nothing about them is faster.
        """
        assert self.table is not None
        paying: list[tuple[float, Candidate]] = []
        slow = []
        stored = [c for c in found if isinstance(c.choice.graph_pass, WeightPass)]
        for item in [c for c in found if c not in stored][:_TIMED_METHODS]:
            timed = self.table.time(self.prepared.model, layer, item.choice)
            if timed is None:
                paying.append((0.0, item))  # the whole model's timing will tell
                continue
            if timed is not CRASHED:
                self.times[layer.name, item.choice] = timed
            if timed.faster:
                paying.append((-timed.saved_ms, item))
            else:
                slow.append(timed.refusal(item.choice))
        paying.sort(key=lambda pair: pair[0])
        return [item for _, item in paying] + stored or "; ".join(slow)

    def _verdict(self, chosen: Mapping[str, Candidate]) -> str | None:
        try:
            too_large = self.assessor.too_large(self.factory.build(choices_of(chosen)))
            if too_large is not None or self.assessor.judge is None:
                return too_large
            quality = self.assessor.judged(choices_of(chosen))
        except ModelError as error:
            return str(error)
        return self.assessor.over(quality)

    def worth(self, name: str, item: Candidate) -> tuple[bool, float]:
        """Sort key of what a replacement saves: measured milliseconds first, then counted work."""
        saved = self.saved_ms(name, item)
        return (True, -item.saved) if saved is None else (False, -saved)

    def saved_ms(self, name: str, item: Candidate) -> float | None:
        """Milliseconds that a replacement saves alone, where it was timed."""
        timed = self.times.get((name, item.choice))
        return None if timed is None else timed.saved_ms


def saved_macs(prepared: Prepared, chosen: Chosen) -> int:
    """Multiply-accumulates that replacements save at users whose shapes are known."""
    return sum(
        _known_saving(layer, chosen[layer.name].choice)
        for layer in prepared.layers
        if layer.name in chosen
    )


def _known_saving(layer: Layer, choice: Choice) -> int:
    """Of those, not of the ones in bodies."""
    seen = tuple(u for u in layer.uses if u.x_shape is not None and u.y_shape is not None)
    known = replace(layer, uses=seen)
    return (known.macs or 0) - (chain_macs(known, choice.graph_pass, choice.rank) or 0)
