"""The frontier: every model that was judged, with its loss, its milliseconds and its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnxlr.candidates.candidate import candidate
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import layer_work
from onnxlr.plan.evaluate import Evaluator, Judged
from onnxlr.plan.plan import Decision, Plan, keep, use
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.settle import Selection
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.latency import Comparison


@dataclass(frozen=True)
class Point:
    """A model of the frontier.

    Attributes
    ----------
    loss : float
        By the metric, on the samples that choose.
    low, high : float or None
        Ends of its interval; None where samples can't be told apart.
    ms : float or None
        Of one run; None where nothing is known of it.
    measured : bool
        Whether ``ms`` comes from timing the whole model, and not from its layers'.
    bytes : int
    layers : int
        How many are replaced.
    chosen : bool
        Whether it is what was handed over.
    plan : Plan
        What makes it.
    file_name : str
        Of its plan, in a folder for those of all points.
    """

    loss: float
    low: float | None
    high: float | None
    ms: float | None
    measured: bool
    bytes: int
    layers: int
    chosen: bool
    plan: Plan
    file_name: str = ""

    def beats(self, other: "Point") -> bool:
        """Whether it is nowhere worse than another, and better somewhere."""
        mine, theirs = self._figures(), other._figures()
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    def _figures(self) -> tuple[float, float]:
        return self.loss, self.bytes if self.ms is None else self.ms


def frontier(
    evaluator: Evaluator, proposal: Proposal, selection: Selection, plan: Plan
) -> tuple[Point, ...]:
    """The points of a run, from the least loss to the largest; the original is the first.

    Parameters
    ----------
    evaluator : Evaluator
    proposal : Proposal
    selection : Selection
    plan : Plan
        What is handed over.
    """
    if evaluator.judge is None or evaluator.promise is None:
        return ()
    total = _original_ms(evaluator, proposal, selection.speed)
    nbytes = evaluator.prepared.source.nbytes
    nothing = replace(
        plan,
        decisions=tuple(keep(layer, "the original") for layer in evaluator.prepared.layers),
        calibration=None,
    )
    unchanged = not selection.chosen
    points = [
        Point(
            *(0.0, 0.0, 0.0, total, selection.speed is not None, nbytes, 0, unchanged),
            plan if unchanged else nothing,
        )
    ]
    chosen = selection.variant.choices, selection.variant.sequential
    for item in evaluator.judged:
        is_chosen = not unchanged and (item.choices, item.sequential) == chosen
        ms, measured = _milliseconds(evaluator, proposal, item, total)
        low, high = _interval(evaluator, item.quality)
        points.append(
            Point(
                *(item.quality.drop, low, high, ms, measured, item.nbytes, len(item.choices)),
                is_chosen,
                plan if is_chosen else _plan_of(evaluator, proposal, item, plan),
            )
        )
    points.sort(key=lambda p: (p.loss, p.bytes))
    digits = len(str(len(points)))
    return tuple(replace(p, file_name=f"point-{i:0{digits}}.json") for i, p in enumerate(points, 1))


def _interval(evaluator: Evaluator, quality: Quality) -> tuple[float | None, float | None]:
    assert evaluator.promise is not None
    return evaluator.promise.interval(quality) or (None, None)


def _original_ms(
    evaluator: Evaluator, proposal: Proposal, speed: Comparison | None
) -> float | None:
    """Milliseconds of the original: measured, else those of its layers."""
    if speed is not None:
        return speed.a.median_ms
    total = 0.0
    for layer in evaluator.prepared.layers:
        times = proposal.times.get(layer.name, {})
        work = layer_work(layer)
        if times:
            total += next(iter(times.values())).before_ms
        elif work is not None:
            total += work.usual_ms
    return total or None


def _milliseconds(
    evaluator: Evaluator, proposal: Proposal, item: Judged, total: float | None
) -> tuple[float | None, bool]:
    """Milliseconds of a model, and whether it was timed as a whole."""
    if total is None:
        return None, False
    if (speed := evaluator.speed_of(item.choices, item.sequential)) is not None:
        return total / speed.speedup, True
    saved = 0.0
    for name, choice in item.choices.items():
        time = proposal.times.get(name, {}).get(choice)
        saved += 0.0 if time is None else time.saved_ms
    return max(total - saved, 0.0), False


def _plan_of(evaluator: Evaluator, proposal: Proposal, item: Judged, plan: Plan) -> Plan:
    """The plan that makes a model which was judged and not handed over."""
    decisions = tuple(
        _decision(evaluator, proposal, item.choices, name)
        for name in (layer.name for layer in evaluator.prepared.layers)
    )
    calibration = evaluator.calibration
    if calibration is not None:
        calibration = replace(calibration, sequential=item.sequential)
    return replace(plan, decisions=decisions, calibration=calibration)


def _decision(
    evaluator: Evaluator, proposal: Proposal, choices: Mapping[str, Choice], name: str
) -> Decision:
    layer = evaluator.prepared.layer(name)
    if name not in choices:
        return keep(layer, "not replaced in this point of the frontier")
    choice = choices[name]
    item = candidate(layer, choice.graph_pass, choice.rank, "macs")
    time = proposal.times.get(name, {}).get(choice)
    return use(layer, item, "a point of the frontier", None, None, time)
