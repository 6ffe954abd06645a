"""Methods as they fit a layer: break-even, the ranks that rules give, and candidates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import overload

import numpy as np
import onnx

from onnxlr.candidates.candidate import Candidate, Saving, candidate, saves
from onnxlr.decompose import RankRule, Spectrum, spectrum_of
from onnxlr.decompose.ranks import storage_precision
from onnxlr.errors import one_line
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.methods.cost import chain_params
from onnxlr.methods.registry import find_pass
from onnxlr.system.memo import Memo
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
    spectra : sequence of Spectrum
        One for each unfolding that the method looks at.
    """

    graph_pass: GraphPass
    full: Rank
    limit: Rank
    spectra: Sequence[Spectrum]


@dataclass(frozen=True, eq=False)
class Fits:
    """The methods that fit each layer.

    Attributes
    ----------
    by_layer : mapping of str to tuple of Fit
        By layer name; empty for a layer that none fits.
    refusals : mapping of str to tuple of str
        Why the other methods don't fit, as far as they are for the layer's operator.
    """

    by_layer: Mapping[str, tuple[Fit, ...]]
    refusals: Mapping[str, tuple[str, ...]]

    @property
    def reasons(self) -> dict[str, str]:
        """Why no method fits a layer, for each layer that none fits."""
        return {
            name: "; ".join(dict.fromkeys(self.refusals[name]))
            for name, fits in self.by_layer.items()
            if not fits
        }

    def layers(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those of some layers that a method fits."""
        return [layer for layer in layers if self.by_layer[layer.name]]


class LazySpectra(Sequence[Spectrum]):
    """The spectra of a layer's unfoldings, computed when one is asked for.

    A rank that is named by number never needs them.
    """

    def __init__(self, layer: Layer, graph_pass: GraphPass, memo: Memo[Spectrum]) -> None:
        self._layer, self._pass, self._memo = layer, graph_pass, memo

    @cached_property
    def _all(self) -> tuple[Spectrum, ...]:
        return tuple(
            self._memo.get(stack, None, partial(spectrum_of, stack))
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


def fit_all(
    layers: Sequence[Layer],
    passes: Sequence[GraphPass],
    excluded: Callable[[Layer], str | None],
) -> Fits:
    """The methods that fit each layer, or why none does.

    Parameters
    ----------
    layers : sequence of Layer
    passes : sequence of GraphPass
    excluded : callable
        Says why the user leaves a layer out; None where the user doesn't.
    """
    by_layer: dict[str, tuple[Fit, ...]] = {}
    refusals: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        why = excluded(layer)
        by_layer[layer.name], refusals[layer.name] = (
            ((), (why,)) if why else fit_methods(layer, passes)
        )
    return Fits(by_layer, refusals)


def fit_methods(
    layer: Layer, passes: Sequence[GraphPass]
) -> tuple[tuple[Fit, ...], tuple[str, ...]]:
    """The methods that exist for a layer, and the reasons of those that don't."""
    fits, reasons = [], []
    memo = Memo[Spectrum](len(passes) * 4)
    for graph_pass in passes:
        fit = fit_method(layer, graph_pass, memo)
        if isinstance(fit, Fit):
            fits.append(fit)
        elif layer.refusal is not None or layer.op in graph_pass.ops:
            reasons.append(fit)
    if not passes:
        reasons.append(layer.refusal or "no method was asked for that replaces layers")
    elif not fits and not reasons:  # all are for other operators
        reasons.append(f"no method replaces {layer.op} among {', '.join(p.name for p in passes)}")
    return tuple(fits), tuple(reasons)


def _can_be(layer: Layer, rank: object) -> bool:
    """Whether what a method says may be a rank of this layer's weight."""
    return isinstance(rank, int | np.integer) and 0 <= int(rank) <= max(1, layer.params)


def fit_method(layer: Layer, graph_pass: GraphPass, memo: Memo[Spectrum]) -> Fit | str:
    """A method as it fits a layer, or why it doesn't exist there."""
    barred = graph_pass.barred(layer)
    reason = barred if barred is not None else graph_pass.refuse(layer)
    if reason is not None:
        return reason
    try:
        full = graph_pass.full_rank(layer)
        if not all(map(partial(_can_be, layer), full)):
            return f"{graph_pass.name}: it gives {full} as the full rank, which is impossible"
        limit = break_even(layer, graph_pass)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        return f"{graph_pass.name}: the sizes around it contradict each other: {one_line(error)}"
    return Fit(graph_pass, full, limit, LazySpectra(layer, graph_pass, memo))


def break_even(layer: Layer, graph_pass: GraphPass) -> Rank:
    """The largest rank, in proportion to the full one, that saves parameters and MACs.

    Exact arithmetic on the nodes of the chain, for the weight stored once and all of its users.
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


def named_candidates(
    layer: Layer, fits: Sequence[Fit], rule: RankRule, saving: Saving, *, factorizing: bool = True
) -> list[Candidate] | str:
    """Every method at the rank a rule gives it, the most saving first, or why there is none.

    Factors that only show when they are made to be unusable are refused, unless ``factorizing`` is
    off.
    """
    candidates: list[Candidate] = []
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
            instead = _fall_back(layer, fit, rank, saving, unusable)
            if instead is None:
                reasons.append(unusable)
            else:
                candidates.append(instead)
        else:
            candidates.append(candidate(layer, fit.graph_pass, rank, saving))
    return _most_saved(candidates) if candidates else "; ".join(dict.fromkeys(reasons))


def _fall_back(layer: Layer, fit: Fit, rank: Rank, saving: Saving, why: str) -> Candidate | None:
    """The method that takes over, at its largest proportional rank of no more parameters."""
    other = _successor(layer, fit)
    if other is None:
        return None
    most = chain_params(layer, fit.graph_pass, rank)
    for smaller in reversed(other.graph_pass.ladder(layer)):
        fits = chain_params(layer, other.graph_pass, smaller) <= most
        if fits and saves(layer, other.graph_pass, smaller):
            return candidate(layer, other.graph_pass, smaller, saving, _instead(why, other))
    return None


def _successor(layer: Layer, fit: Fit) -> Fit | None:
    """The method that takes over from one whose factors are unusable, if it exists here."""
    if not fit.graph_pass.fallback:
        return None
    other = fit_method(layer, find_pass(fit.graph_pass.fallback), Memo[Spectrum](2))
    return other if isinstance(other, Fit) else None


def _instead(why: str, other: Fit) -> str:
    return f"{why}: {other.graph_pass.name} instead"


def auto_candidates(
    layer: Layer, fits: Sequence[Fit], error: float, saving: Saving, *, gridded: bool = True
) -> list[Candidate] | str:
    """Every method at its most saving rank within a weight error, on the hardware's grid or not."""
    candidates, reasons = [], []
    for fit in fits:
        within = fit.graph_pass.ranks_within(layer, error, fit.spectra, fit.limit, gridded=gridded)
        ranks = list(dict.fromkeys(within))
        saving_ranks = [rank for rank in ranks if saves(layer, fit.graph_pass, rank)]
        if saving_ranks:
            rows = [candidate(layer, fit.graph_pass, rank, saving) for rank in saving_ranks]
            candidates.append(_most_saved(rows)[0])
            continue
        other = _successor(layer, fit)
        unusable = None
        if other is not None and 0 not in fit.limit:
            unusable = fit.graph_pass.unusable(layer, fit.limit)
        if other is not None and unusable is not None:
            instead = auto_candidates(layer, (other,), error, saving, gridded=gridded)
            if isinstance(instead, list):
                candidates += [replace(c, note=_instead(unusable, other)) for c in instead]
                continue
        reasons.append(unusable or _no_gain(layer, fit, ranks[0], f"a weight error of {error:g}"))
    return _most_saved(candidates) if candidates else "; ".join(dict.fromkeys(reasons))


def _most_saved(candidates: list[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda item: (-item.saved, item.params))


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
