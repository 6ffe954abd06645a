"""Which modules of a model are distorted, by which method and at which rank."""

import math
from collections.abc import Sequence

from onnxlr.candidates.candidate import Candidate
from onnxlr.candidates.fits import fit_methods, named_candidates
from onnxlr.decompose import RankRule, parse_rank
from onnxlr.errors import UsageError
from onnxlr.layers.layer import Layer
from onnxlr.layers.select import name_filter
from onnxlr.methods.base import GraphPass
from onnxlr.plan.plan import KEEP, Decision
from onnxlr.training.modules import ModuleLayer, Predicate, Refused


def rank_rule(rank: int | tuple[int, ...] | float | str) -> RankRule:
    """The rule that a ``rank`` argument names.

    Raises
    ------
    UsageError
        If it is none, or ``auto``.
    """
    text = ",".join(map(str, rank)) if isinstance(rank, tuple | list) else str(rank)
    rule = parse_rank(text)
    if rule.kind == "auto":
        raise UsageError("rank='auto' needs a model that is judged as it is shrunk: name a rank")
    return rule


def excluded(
    item: ModuleLayer, include: str | Predicate | None, exclude: str | Predicate | None
) -> str | None:
    """Why a module is left as it is, whatever the method; None if it may be distorted.

    Raises
    ------
    UsageError
        If ``include`` or ``exclude`` is neither an expression nor a function.
    """
    for words in (include, exclude):
        if words is not None and not callable(words) and not isinstance(words, str):
            raise UsageError(f"include/exclude={words!r}: give an expression or a function")
    if not item.module.weight.requires_grad:
        return "it is frozen: training would not make up for what it loses"
    if callable(include):
        if not include(item.name, item.module):
            return "not taken by include"
        include = None
    if callable(exclude):
        if exclude(item.name, item.module):
            return "taken out by exclude"
        exclude = None
    return name_filter(include, exclude)(item.layer)


def best_candidate(layer: Layer, passes: Sequence[GraphPass], rule: RankRule) -> Candidate | str:
    """The method that saves most at the rank that the rule gives it, or why there is none."""
    fits, reasons = fit_methods(layer, passes)
    if not fits:
        return "; ".join(reasons)
    # Weights that are trained on are followed, which keeps factors usable.
    candidates = named_candidates(layer, fits, rule, "params", factorizing=False)
    return candidates if isinstance(candidates, str) else candidates[0]


def refused_decision(item: Refused) -> Decision:
    """The decision to keep a module that no method can take."""
    count = math.prod(item.shape)
    return Decision(
        item.name, item.kind, item.shape, KEEP, None, item.reason, count, count, None, None, None
    )
