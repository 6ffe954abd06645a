"""Methods as they fit a layer: break-even, the ranks that rules give, and candidates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, overload

import numpy as np
import onnx

from onnxlr.decompose import RankRule, Spectrum, spectrum_of
from onnxlr.decompose.ranks import storage_precision
from onnxlr.errors import one_line
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass, WeightPass
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import chain_macs, chain_params
from onnxlr.methods.registry import find_pass
from onnxlr.system.memo import Kept
from onnxlr.types import Rank, rank_text

# Relative weight errors among which the rank rule `auto` searches for what the metric allows.
AUTO_ERRORS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
UNVERIFIED_AUTO_ERROR = 0.1


@dataclass(frozen=True, eq=False)
class Fit:
    """A method that exists for a layer, with the spectra that decide its rank.

    Attributes
    ----------
    graph_pass : GraphPass
    full : tuple of int
        The rank at which it is exact.
    limit : tuple of int
        The largest rank in proportion to the full one that saves both parameters and MACs; all
        zeros if none does.
    spectra : Spectra
        One for each unfolding that the method looks at, computed when it is first looked at.
    """

    graph_pass: GraphPass
    full: Rank
    limit: Rank
    spectra: "Spectra"


class Spectra(Sequence[Spectrum]):
    """The spectra of a layer's unfoldings: a rank that was named by number never needs them."""

    def __init__(self, layer: Layer, graph_pass: GraphPass, known: Kept[Spectrum]) -> None:
        self._layer, self._pass, self._known = layer, graph_pass, known

    def fill(self, spectra: tuple[Spectrum, ...]) -> None:
        """Take what was computed elsewhere."""
        self.__dict__["_all"] = spectra

    @cached_property
    def _all(self) -> tuple[Spectrum, ...]:
        return tuple(
            self._known.get(stack, None, partial(spectrum_of, stack))
            for stack in self._pass.unfoldings(self._layer)
        )

    @overload
    def __getitem__(self, index: int) -> Spectrum: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Spectrum, ...]: ...
    def __getitem__(self, index: int | slice) -> Spectrum | tuple[Spectrum, ...]:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)


@dataclass(frozen=True)
class Candidate:
    """A method at a rank, with what it costs and what it saves.

    ``saved`` is in parameters where the target is stored size, else in MACs where those are known.
    ``note`` says why it isn't the method that was asked for.
    """

    choice: Choice
    params: int
    macs: int | None
    saved: int
    note: str = ""


Goal = Literal["params", "macs"]


def fit_methods(
    layer: Layer, passes: Sequence[GraphPass]
) -> tuple[tuple[Fit, ...], tuple[str, ...]]:
    """The methods that exist for a layer, and the reasons of those that don't."""
    fits, reasons = [], []
    known = Kept[Spectrum](len(passes) * 4)
    for graph_pass in passes:
        found = fit_method(layer, graph_pass, known)
        if isinstance(found, Fit):
            fits.append(found)
        elif layer.refusal is not None or layer.op in graph_pass.ops:
            reasons.append(found)
    if not fits and not reasons:  # all are for other operators
        reasons.append(f"no method replaces {layer.op} among {', '.join(p.name for p in passes)}")
    return tuple(fits), tuple(reasons)


def _can_be(layer: Layer, rank: object) -> bool:
    """Whether what a method says may be a rank of this layer's weight."""
    return isinstance(rank, int | np.integer) and 0 <= int(rank) <= max(1, layer.params)


def fit_method(layer: Layer, graph_pass: GraphPass, known: Kept[Spectrum]) -> Fit | str:
    """A method as it fits a layer, or why it doesn't exist there."""
    barred = layer.weight_refusal if isinstance(graph_pass, WeightPass) else layer.refusal
    reason = barred if barred is not None else graph_pass.refuse(layer)
    if reason is not None:
        return reason
    try:
        full = graph_pass.full_rank(layer)
        if not all(map(partial(_can_be, layer), full)):
            return f"{graph_pass.name}: says that its full rank is {full}, which can't be"
        limit = break_even(layer, graph_pass)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        return f"{graph_pass.name}: the sizes around it contradict each other: {one_line(error)}"
    return Fit(graph_pass, full, limit, Spectra(layer, graph_pass, known))


def break_even(layer: Layer, graph_pass: GraphPass) -> Rank:
    """The largest rank, in proportion to the full one, that saves parameters and MACs.

    Exact arithmetic on the chain's own nodes, for the weight stored once and all of its users.
    All zeros if no rank saves anything.
    """
    ladder = graph_pass.ladder(layer)
    low, high = 0, len(ladder)
    while low < high:  # both counts rise with the rank
        middle = (low + high + 1) // 2
        if saves(layer, graph_pass, ladder[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return ladder[low - 1] if low else tuple(0 for _ in ladder[0])


def saves(layer: Layer, graph_pass: GraphPass, rank: Rank) -> bool:
    """Whether the chain has fewer parameters and, where shapes are known, fewer MACs."""
    if chain_params(layer, graph_pass, rank) >= layer.params:
        return False
    if isinstance(graph_pass, WeightPass):
        return True
    before, after = layer.macs, chain_macs(layer, graph_pass, rank)
    # A lookup has no MACs that its product could save: there only what is stored counts.
    return not before or after is None or after < before


def candidate(
    layer: Layer, graph_pass: GraphPass, rank: Rank, goal: Goal, note: str = ""
) -> Candidate:
    """Cost of a method at a rank."""
    params = chain_params(layer, graph_pass, rank)
    macs = chain_macs(layer, graph_pass, rank)
    saved = layer.params - params
    if goal == "macs" and macs is not None and layer.macs:
        saved = layer.macs - macs
    return Candidate(Choice(graph_pass, rank), params, macs, saved, note)


def named_candidates(
    layer: Layer, fits: Sequence[Fit], rule: RankRule, goal: Goal, *, factorizing: bool = True
) -> list[Candidate] | str:
    """Every method at the rank a rule gives it, the most saving first, or why there is none.

    Factors that only show when they are made to be unusable are refused, unless ``factorizing`` is
    off.
    """
    found: list[Candidate] = []
    reasons: list[str] = []
    precision = storage_precision(layer.dtype.numpy())
    for fit in fits:
        rank = fit.graph_pass.select(layer, rule, fit.spectra, precision, fit.limit)
        if isinstance(rank, str):
            reasons.append(rank)
        elif 0 in rank:
            reasons.append(_zero_rank(rule, fit))
        elif not saves(layer, fit.graph_pass, rank):
            reasons.append(_no_gain(layer, fit, rank, f"{rule}"))
        elif factorizing and (unusable := fit.graph_pass.unusable(layer, rank)) is not None:
            instead = _fall_back(layer, fit, rank, goal, unusable)
            if instead is None:
                reasons.append(unusable)
            else:
                found.append(instead)
        else:
            found.append(candidate(layer, fit.graph_pass, rank, goal))
    return _most_saved(found) if found else "; ".join(dict.fromkeys(reasons))


def _fall_back(layer: Layer, fit: Fit, rank: Rank, goal: Goal, why: str) -> Candidate | None:
    """The method that takes over, at its largest proportional rank of no more parameters."""
    other = _successor(layer, fit)
    if other is None:
        return None
    most = chain_params(layer, fit.graph_pass, rank)
    for smaller in reversed(other.graph_pass.ladder(layer)):
        fits = chain_params(layer, other.graph_pass, smaller) <= most
        if fits and saves(layer, other.graph_pass, smaller):
            return candidate(layer, other.graph_pass, smaller, goal, _instead(why, other))
    return None


def _successor(layer: Layer, fit: Fit) -> Fit | None:
    """The method that takes over from one whose factors are unusable, if it exists here."""
    if not fit.graph_pass.fallback:
        return None
    other = fit_method(layer, find_pass(fit.graph_pass.fallback), Kept[Spectrum](2))
    return other if isinstance(other, Fit) else None


def _instead(why: str, other: Fit) -> str:
    return f"{why}: {other.graph_pass.name} instead"


def auto_candidates(
    layer: Layer, fits: Sequence[Fit], error: float, goal: Goal, *, gridded: bool = True
) -> list[Candidate] | str:
    """Every method at its most saving rank within a weight error, on the hardware's grid or not."""
    found, reasons = [], []
    for fit in fits:
        within = fit.graph_pass.ranks_within(layer, error, fit.spectra, fit.limit, gridded=gridded)
        ranks = list(dict.fromkeys(within))
        saving = [rank for rank in ranks if saves(layer, fit.graph_pass, rank)]
        if saving:
            found.append(
                _most_saved([candidate(layer, fit.graph_pass, r, goal) for r in saving])[0]
            )
            continue
        other = _successor(layer, fit)
        unusable = None
        if other is not None and 0 not in fit.limit:
            unusable = fit.graph_pass.unusable(layer, fit.limit)
        if other is not None and unusable is not None:
            taken = auto_candidates(layer, (other,), error, goal, gridded=gridded)
            if isinstance(taken, list):
                found += [replace(c, note=_instead(unusable, other)) for c in taken]
                continue
        reasons.append(unusable or _no_gain(layer, fit, ranks[0], f"a weight error of {error:g}"))
    return _most_saved(found) if found else "; ".join(dict.fromkeys(reasons))


def _most_saved(found: list[Candidate]) -> list[Candidate]:
    return sorted(found, key=lambda item: (-item.saved, item.params))


def _zero_rank(rule: RankRule, fit: Fit) -> str:
    if not fit.spectra[0].values.any():
        return "the weight is all zeros"
    return f"{fit.graph_pass.name}: {rule} finds no component above the noise (rank 0)"


def _no_gain(layer: Layer, fit: Fit, rank: Rank, wanted: str) -> str:
    name = fit.graph_pass.name
    if 0 in fit.limit:
        one = chain_params(layer, fit.graph_pass, tuple(1 for _ in fit.full))
        return (
            f"{name}: no rank saves anything (rank 1 takes {one:,} parameters, "
            f"{layer.params:,} are stored)"
        )
    words = "full rank" if rank == fit.full else "rank"
    needed = f"{name}: {wanted} needs {words} {rank_text(rank)}, "
    if len(rank) > 2 and rank[1:] != fit.limit[1:]:  # on other tiles ranks don't compare
        return f"{needed}which saves nothing"
    return (
        f"{needed}only up to {rank_text(fit.limit)} saves anything"
        f"{' in proportion' if len(rank) > 1 else ''}"
    )
