"""The frontier: every model that was judged, with its loss, its milliseconds and its bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnxlr.candidates.candidate import candidate
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import count_macs
from onnxlr.methods.cost import layer_work
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.judged import Judged
from onnxlr.plan.plan import Decision, Plan, keep, use, with_fewer_channels
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.settle import Selection
from onnxlr.plan.width_plan import WidthPlan
from onnxlr.prepare.prepared import Prepared
from onnxlr.rewrite.variant import Variant
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.latency import Comparison
from onnxlr.widths.narrowing import Narrowing

_LEAST_LEFT = 0.02  # of the original's time: no prediction is better


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
        How many are replaced, or have fewer channels.
    chosen : bool
        Whether it is what was handed over.
    plan : Plan
        What makes it.
    refused : str
        Why it isn't handed over, where the test samples told so; empty for all others.
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
    refused: str = ""
    file_name: str = ""

    def beats(self, other: "Point") -> bool:
        """Whether it is nowhere worse than another, and better somewhere."""
        mine, theirs = self._figures(), other._figures()
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    def _figures(self) -> tuple[float, float]:
        return self.loss, self.bytes if self.ms is None else self.ms


Proposals = Mapping[Narrowing | None, Proposal]  # on the original, and on fewer channels
PlansOfWidths = Callable[[Narrowing | None], WidthPlan]


def frontier(
    evaluator: Evaluator,
    proposals: Proposals,
    selection: Selection,
    plan: Plan,
    width_plan: PlansOfWidths,
) -> tuple[Point, ...]:
    """The points of a run, from the least loss to the largest.

    The original is among them. Losses, times and bytes are after the step of ``--behind``.

    Parameters
    ----------
    evaluator : Evaluator
    proposals : mapping of Narrowing or None to Proposal
        What was learned about layers on each model that chains were looked for on.
    selection : Selection
    plan : Plan
        What is handed over.
    width_plan : callable
        Gives the decisions for widths.
    """
    if evaluator.judge is None or evaluator.promise is None:
        return ()
    total = original_ms(evaluator, proposals[None], selection.speed)
    nbytes = evaluator.verdicts.most_bytes
    alone, nothing_lost = evaluator.behind_alone, (0.0, 0.0, 0.0)
    losses = nothing_lost if alone is None else (alone.drop, *_interval(evaluator, alone))
    nothing = replace(
        plan,
        decisions=tuple(keep(layer, "the original") for layer in evaluator.original.layers),
        calibration=None,
        widths=WidthPlan(),
    )
    unchanged = not selection.variant.changes_anything
    points = [
        Point(
            *(*losses, total, selection.speed is not None, nbytes, 0, unchanged),
            plan if unchanged else nothing,
        )
    ]
    for item, ms in _with_times(evaluator, proposals, total):
        is_chosen = not unchanged and item.key == selection.variant.key
        proposal = proposals.get(item.narrowing, Proposal({}, {}))
        measured = total is not None and evaluator.speed_of(item) is not None
        low, high = _interval(evaluator, item.quality)
        points.append(
            Point(
                *(item.quality.drop, low, high, ms, measured, item.nbytes, _changed(item)),
                is_chosen,
                plan if is_chosen else _plan_of(evaluator, proposal, item, plan, width_plan),
                _refused_words(selection, item),
            )
        )
    points.sort(key=lambda p: (p.loss, p.bytes))
    digits = len(str(len(points)))
    return tuple(replace(p, file_name=f"point-{i:0{digits}}.json") for i, p in enumerate(points, 1))


def _refused_words(selection: Selection, item: Judged) -> str:
    """What a model lost on the test samples, if it is the first that failed there."""
    refused, promise = selection.refused, selection.verdicts.promise
    if refused is None or promise is None or not promise.tested:
        return ""
    if item.key != refused.rung.variant.key or not refused.quality.losses:
        return ""
    return f"{promise.lost(refused.quality.drop)} on the test samples"


def _interval(evaluator: Evaluator, quality: Quality) -> tuple[float | None, float | None]:
    assert evaluator.promise is not None
    return evaluator.promise.interval(quality) or (None, None)


def original_ms(evaluator: Evaluator, proposal: Proposal, speed: Comparison | None) -> float | None:
    """Milliseconds of the original: measured, else those of its layers."""
    if speed is not None:
        return speed.a.median_ms
    total = 0.0
    for layer in evaluator.original.layers:
        times = proposal.times.get(layer.name, {})
        work = layer_work(layer)
        if times:
            total += next(iter(times.values())).before_ms
        elif work is not None:
            total += work.usual_ms
    return total or None


def _with_times(
    evaluator: Evaluator, proposals: Proposals, total: float | None
) -> Iterator[tuple[Judged, float | None]]:
    """The models that were judged, with their milliseconds as far as something is known of them."""
    for items in _by_base(evaluator):
        if total is None:
            yield from ((item, None) for item in items)
            continue
        proposal = proposals.get(items[0].narrowing, Proposal({}, {}))
        left = time_left(evaluator, proposal, items, total)
        yield from ((item, total * share) for item, share in zip(items, left, strict=True))


def _by_base(evaluator: Evaluator) -> list[list[Judged]]:
    """The models that were judged, by the model whose layers they replace; with none, together."""
    groups: dict[object, list[Judged]] = {}
    for item in evaluator.judged:
        groups.setdefault(item.narrowing if item.choices else "channels alone", []).append(item)
    return list(groups.values())


def time_left(
    evaluator: Evaluator, proposal: Proposal, items: Sequence[Judged | Variant], total: float
) -> list[float]:
    """The time of models of one course, as shares of the original's.

    Those that were timed have what was measured. Of the others it is predicted from their layers,
    which mislead where the runtime fuses, and put right by what the boldest that was timed saved.

    Parameters
    ----------
    evaluator : Evaluator
    proposal : Proposal
        What was learned about the layers.
    items : sequence of Judged or Variant
    total : float
        Milliseconds of the original.
    """
    saved = [saved_ms(proposal, item, total) / total for item in items]
    speeds = [evaluator.speed_of(item) for item in items]
    counted, gained = max(
        ((s, 1 - 1 / v.speedup) for s, v in zip(saved, speeds, strict=True) if v is not None),
        default=(1.0, 1.0),
    )
    realised = gained / counted if counted > 0 else 1.0
    return [
        max(1 - realised * share, _LEAST_LEFT) if speed is None else 1 / speed.speedup
        for share, speed in zip(saved, speeds, strict=True)
    ]


def saved_ms(proposal: Proposal, item: Judged | Variant, total: float) -> float:
    """Milliseconds that a model saves, by those of its layers and by what fewer channels count.

    Parameters
    ----------
    proposal : Proposal
        What was learned about its layers.
    item : Judged or Variant
    total : float
        Milliseconds of the original.
    """
    saved = 0.0
    if item.narrowing is not None:
        before, after = (count_macs(p.model, p.shapes) for p in _both(item.narrowing))
        saved = total * (1 - after / before) if before else 0.0
    for name, choice in item.choices.items():
        saved += proposal.saved_ms(name, choice) or 0.0
    return saved


def _changed(item: Judged) -> int:
    """How many layers aren't as they were."""
    if item.narrowing is None:
        return len(item.choices)
    pairs = zip(*(p.layers for p in _both(item.narrowing)), strict=True)
    return sum(a.shape != b.shape or b.name in item.choices for a, b in pairs)


def _both(narrowing: Narrowing) -> tuple[Prepared, Prepared]:
    return narrowing.origin, narrowing.prepared


def _plan_of(
    evaluator: Evaluator,
    proposal: Proposal,
    item: Judged,
    plan: Plan,
    width_plan: PlansOfWidths,
) -> Plan:
    """The plan that makes a model which was judged and not handed over."""
    narrowing, calibration = item.narrowing, item.calibration
    prepared = evaluator.original if narrowing is None else narrowing.prepared
    now = {layer.name: layer for layer in prepared.layers}
    decisions = tuple(
        with_fewer_channels(layer, now[layer.name], _decision(now[layer.name], proposal, item))
        for layer in evaluator.original.layers
    )
    if calibration is not None:
        calibration = replace(calibration, sequential=item.sequential)
    widths = width_plan(narrowing)
    return replace(plan, decisions=decisions, calibration=calibration, widths=widths)


def _decision(layer: Layer, proposal: Proposal, item: Judged) -> Decision:
    if layer.name not in item.choices:
        return keep(layer, "not replaced in this point of the frontier")
    choice = item.choices[layer.name]
    row = candidate(layer, choice.graph_pass, choice.rank, "macs")
    time = proposal.times.get(layer.name, {}).get(choice)
    return use(layer, row, "a point of the frontier", None, None, time)
