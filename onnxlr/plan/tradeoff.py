"""What every candidate of every layer costs and loses, and the choice among them that is best."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from onnxlr.candidates.candidate import Candidate
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice
from onnxlr.plan.knapsack import allocate, pareto
from onnxlr.plan.plan import Alternative
from onnxlr.plan.sensitivity import Sensitivity
from onnxlr.types import ms_text, rank_text
from onnxlr.verify.layer_latency import LayerTime


@dataclass(frozen=True, eq=False)
class LayerTradeoff:
    """What is weighed for a layer.

    Attributes
    ----------
    layer : Layer
    as_is : float
        What the layer costs as it is, in the unit of the candidates' costs.
    considered : tuple of Candidate
        All candidates, with their predicted errors.
    candidates : tuple of Candidate
        Those that may be chosen, with costs and losses; none is beaten in both.
    times : mapping of Choice to LayerTime
        Of the candidates that were timed.
    sensitivity : Sensitivity or None
        What errors of the layer do to the model; None where that isn't told.
    reason : str
        Why nothing may be chosen; empty where something may.
    more_ms : float
        Milliseconds that candidates take more within the model than alone, in the costs already.
    """

    layer: Layer
    as_is: float
    considered: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    times: Mapping[Choice, LayerTime]
    sensitivity: Sensitivity | None
    reason: str
    more_ms: float = 0.0

    def harm(self, error: float) -> float | None:
        """Predicted relative error of the model's outputs for an error of this layer's."""
        harm = math.inf if self.sensitivity is None else self.sensitivity.harm(error)
        return harm if math.isfinite(harm) else None

    def costing_more(self, ms: float) -> "LayerTradeoff":
        """The same with candidates that take so much longer; without those that save nothing."""
        candidates = tuple(
            pareto([replace(c, cost=c.cost + ms) for c in self.candidates], self.as_is)
        )
        reason = self.reason
        if self.candidates and not candidates:
            reason = (
                f"not faster within the model: a replacement that saves time alone takes "
                f"{ms_text(ms)} ms more there"
            )
        more = self.more_ms + ms
        return replace(self, candidates=candidates, reason=reason, more_ms=more)

    def alternatives(self) -> tuple[Alternative, ...]:
        """All that was weighed, the most saving last."""
        rows = []
        for item in sorted(self.considered, key=lambda c: c.saved):
            time = self.times.get(item.choice)
            rows.append(
                Alternative(
                    item.choice.graph_pass.name,
                    item.choice.rank,
                    item.params,
                    item.macs,
                    item.error,
                    self.harm(item.error),
                    None if time is None else time.before_ms,
                    None if time is None else time.after_ms,
                )
            )
        return tuple(rows)

    def why_kept(self) -> str | None:
        """Why the layer is left as it is although nobody put it back; None where nothing is told.

        Either nothing may be chosen, or other layers save more for less loss.
        """
        if self.reason:
            return self.reason
        if not self.candidates:
            return None
        mildest = min(self.candidates, key=lambda c: c.loss)
        choice = mildest.choice
        return (
            f"other layers save more for less loss: {choice.graph_pass.name} at rank "
            f"{rank_text(choice.rank)} alone would leave a rel. error of "
            f"{self.harm(mildest.error):.3g}"
        )


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """Candidates of all layers, with costs in one unit and losses that add up.

    The loss of a candidate is its layer's sensitivity × error²: the squared relative error of the
    model's outputs, or the divergence of its class probabilities, with only that layer replaced.
    Of independent layers, such losses add.

    Attributes
    ----------
    layers : mapping of str to LayerTradeoff
        By layer name.
    """

    layers: Mapping[str, LayerTradeoff]

    @property
    def as_is(self) -> dict[str, float]:
        """What each layer costs as it is."""
        return {name: row.as_is for name, row in self.layers.items()}

    def allocate(
        self,
        *,
        most_loss: float | None = None,
        most_cost: float | None = None,
        weights: Mapping[str, float] | None = None,
        names: Set[str] | None = None,
    ) -> dict[str, Candidate] | None:
        """The cheapest choice within a loss, or the least lossy one within a cost.

        The loss of a layer counts as often as its weight says, else once. Only layers of these
        names are replaced, or any.
        """
        candidates = {
            name: row.candidates if names is None or name in names else ()
            for name, row in self.layers.items()
        }
        return allocate(
            *(candidates, self.as_is),
            most_loss=most_loss,
            most_cost=most_cost,
            weights=weights,
            families={
                name: [sibling.name for sibling in row.layer.siblings]
                for name, row in self.layers.items()
                if any(c.shares for c in row.candidates)
            },
        )

    def cost(self, chosen: Mapping[str, Candidate]) -> float:
        """What the layers cost with these replaced, in the unit of the budget."""
        return sum(
            next((c.cost for c in row.candidates if c == chosen.get(name)), row.as_is)
            for name, row in self.layers.items()
        )

    def least_cost(self) -> float:
        """What the layers cost with the cheapest candidate of each."""
        return sum(
            min((c.cost for c in row.candidates), default=row.as_is) for row in self.layers.values()
        )

    def saved(self, chosen: Mapping[str, Candidate]) -> float:
        """What these replacements save of what all layers cost."""
        return sum(self.as_is.values()) - self.cost(chosen)

    def losses(self, chosen: Mapping[str, Candidate]) -> dict[str, float]:
        """The predicted loss of every layer that has candidates, 0 where it is kept."""
        return {
            name: next((c.loss for c in row.candidates if c == chosen.get(name)), 0.0)
            for name, row in self.layers.items()
            if row.candidates
        }
