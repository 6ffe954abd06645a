"""The least lossy set within a budget of time, work or size, held on the saved file."""

from onnxlr.calibrate.budget import sample_seconds
from onnxlr.candidates.candidate import Candidate
from onnxlr.errors import BudgetError, ModelError
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import count_macs
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import chain_macs, layer_work
from onnxlr.model.constants import count_params
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.judged import Evaluation
from onnxlr.plan.search import Chosen, choices_of, least_damaging
from onnxlr.plan.tradeoff import Tradeoff
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples


def within_budget(
    evaluator: Evaluator, tradeoff: Tradeoff, fraction: float
) -> tuple[Chosen, Evaluation]:
    """The least lossy set within a fraction of the original, and its evaluation.

    Raises
    ------
    BudgetError
        If there is none, it is outside the accuracy limit, or it can't be run.
    """
    try:
        return _least_lossy(evaluator, tradeoff, fraction)
    except ModelError as error:
        raise BudgetError(f"the budget can't be met: {error}") from None


def _least_lossy(
    evaluator: Evaluator, tradeoff: Tradeoff, fraction: float
) -> tuple[Chosen, Evaluation]:
    """The same, where a set that can't be run is another error."""
    goal, limits = evaluator.options.goal, evaluator.limits
    total = _total(evaluator, tradeoff, goal)
    others = total - sum(tradeoff.as_is.values())
    budget = fraction * total - others
    least = others + tradeoff.least_cost()
    target = f"--target {goal}={fraction:g}"
    for _ in range(limits.budget_corrections):
        chosen = tradeoff.allocate(most_cost=budget)
        if chosen is None:
            raise BudgetError(
                f"{target} can't be met: the boldest candidates leave {least / total:.0%} of "
                f"the model's {goal}; allow a larger share, or more methods"
            )
        with evaluator.progress.stage(f"verify {len(chosen)} replaced layers", None):
            cost = _cost(evaluator, tradeoff, goal, total, chosen)
        most = fraction * total * (1 + 1e-9)
        if cost <= most:
            refined = _refined(evaluator, tradeoff, chosen, budget)
            if refined != chosen and _cost(evaluator, tradeoff, goal, total, refined) <= most:
                chosen = refined
            evaluation = evaluator.improved(choices_of(chosen))
            if (why := evaluator.verdicts.why_ruled_out(evaluation.quality)) is not None:
                raise BudgetError(f"{target} is outside the accuracy allowed: {why}")
            return chosen, evaluation
        # Names, nodes and biases take their share too; what this choice left free was theirs.
        budget = min(budget, tradeoff.cost(chosen)) - (cost - fraction * total)
    raise BudgetError(f"{target} can't be met: {cost / total:.2%} is the nearest that was found")


def _refined(evaluator: Evaluator, tradeoff: Tradeoff, chosen: Chosen, budget: float) -> Chosen:
    """The least damaging set near one that the budget leads to, measured on what judges."""
    feeding, limits = evaluator.feeding, evaluator.limits
    if feeding is None or not isinstance(feeding.choose, Samples):
        return chosen
    samples = 0
    seconds = len(feeding.choose) * sample_seconds(evaluator.prepared)
    if evaluator.can_correct(choices_of(chosen)):
        some = min(evaluator.correction_samples, limits.refined_samples)
        longer = seconds + evaluator.correction_seconds(some)
        if longer * limits.refined_sets_least <= limits.refining_seconds:
            samples, seconds = some, longer
    most = min(limits.refined_sets, int(limits.refining_seconds / seconds))
    if most < limits.refined_sets_least:
        return chosen
    losses = tradeoff.losses(chosen)
    with evaluator.progress.stage("weigh layers against each other", most) as step:

        def damage(item: Chosen) -> float:
            step(f"{len(item)} layers")
            return evaluator.damage(choices_of(item), samples)

        return least_damaging(
            chosen,
            sorted(losses, key=lambda name: -losses[name]),
            lambda weights: tradeoff.allocate(most_cost=budget, weights=weights),
            damage,
            most,
        )


def _total(evaluator: Evaluator, tradeoff: Tradeoff, goal: str) -> float:
    """What the original costs as a whole."""
    prepared = evaluator.prepared
    if goal == "latency":
        return evaluator.original_ms() if evaluator.timed else _usual_total(prepared, tradeoff)
    if goal == "macs":
        return count_macs(prepared.model, prepared.shapes)
    return prepared.source.nbytes if goal == "bytes" else count_params(prepared.source.model)


def _usual_total(prepared: Prepared, tradeoff: Tradeoff) -> float:
    """Milliseconds of all layers, those without candidates at a usual speed."""
    rest = [
        work.usual_ms
        for layer in prepared.layers
        if layer.name not in tradeoff.layers and (work := layer_work(layer)) is not None
    ]
    return sum(tradeoff.as_is.values()) + sum(rest)


def _cost(
    evaluator: Evaluator, tradeoff: Tradeoff, goal: str, total: float, chosen: Chosen
) -> float:
    """What the model of a set costs as a whole, where the original costs ``total``."""
    if goal == "latency" and not evaluator.timed:
        return total - sum(_saved_ms(tradeoff, name, item) for name, item in chosen.items())
    if goal == "macs":
        return total - saved_macs(evaluator.prepared, chosen)
    variant = evaluator.factorizer.variant(choices_of(chosen))
    if goal == "latency":
        return total / evaluator.compare(variant).speedup
    built = evaluator.builder.build(variant)
    return built.nbytes if goal == "bytes" else built.params


def _saved_ms(tradeoff: Tradeoff, name: str, item: Candidate) -> float:
    """Milliseconds that a replacement saves alone; 0 where it wasn't timed."""
    time = tradeoff.layers[name].times.get(item.choice)
    return 0.0 if time is None else time.saved_ms


def saved_macs(prepared: Prepared, chosen: Chosen) -> int:
    """Multiply-accumulates that replacements save at users whose shapes are inferred."""
    return sum(
        _saved_in_sight(layer, chosen[layer.name].choice)
        for layer in prepared.layers
        if layer.name in chosen
    )


def _saved_in_sight(layer: Layer, choice: Choice) -> int:
    """What a choice saves at a layer's users whose shapes are inferred."""
    visible = layer.in_sight
    return (visible.macs or 0) - (chain_macs(visible, choice.graph_pass, choice.rank) or 0)
