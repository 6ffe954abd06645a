"""A candidate: a method at a rank for a layer, with what it costs and what it saves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import chain_macs, chain_params
from onnxlr.types import Rank


@dataclass(frozen=True)
class Candidate:
    """A method at a rank, with what it costs, what it saves, and what it is predicted to lose.

    Attributes
    ----------
    choice : Choice
    params : int
        Elements that its factors store.
    macs : int or None
        Multiply-accumulates of its chains; None where shapes are unknown.
    saved : int
        Parameters where the target is stored size, else MACs where shapes are inferred.
    note : str
        Why it isn't the method that was asked for.
    error : float
        Predicted relative error of the layer's output, or of its weight where its inputs weren't
        looked at; infinite where nothing was predicted.
    cost : float
        In the unit of a budget: milliseconds, multiply-accumulates, parameters or bytes.
    loss : float
        Predicted for the whole model, with only this layer replaced; losses of layers add up.
    """

    choice: Choice
    params: int
    macs: int | None
    saved: int
    note: str = ""
    error: float = math.inf
    cost: float = math.inf
    loss: float = math.inf

    @property
    def shares(self) -> bool:
        """Whether it is chosen for all siblings or none, as they have a factor in common."""
        return self.choice.graph_pass.shares


def by_sharing(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates of a layer alone, and those shared with siblings: they aren't rivals."""
    alone, shared = ([c for c in candidates if c.shares is shares] for shares in (False, True))
    return alone, shared


Saving = Literal["params", "macs"]  # what candidates are ordered by


def saves(layer: Layer, graph_pass: GraphPass, rank: Rank) -> bool:
    """Whether the chain has fewer parameters and, where shapes are inferred, fewer MACs."""
    if chain_params(layer, graph_pass, rank) >= layer.params:
        return False
    if graph_pass.at_load:
        return True
    before, after = layer.macs, chain_macs(layer, graph_pass, rank)
    # A lookup has no MACs that its product could save: there only what is stored counts.
    return not before or after is None or after < before


def candidate(
    layer: Layer, graph_pass: GraphPass, rank: Rank, saving: Saving, note: str = ""
) -> Candidate:
    """Cost of a method at a rank."""
    params = chain_params(layer, graph_pass, rank)
    macs = chain_macs(layer, graph_pass, rank)
    saved = layer.params - params
    if saving == "macs" and macs is not None and layer.macs:
        saved = layer.macs - macs
    return Candidate(Choice(graph_pass, rank), params, macs, saved, note)
