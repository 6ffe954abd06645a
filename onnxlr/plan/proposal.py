"""The result of a search, before the whole model is measured once more."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from onnxlr.candidates.candidate import Candidate
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice
from onnxlr.plan.judged import Evaluation
from onnxlr.plan.plan import Alternative
from onnxlr.plan.search import Chosen
from onnxlr.plan.sensitivity import Sensitivity
from onnxlr.verify.layer_latency import LayerTime


@dataclass(frozen=True)
class Proposal:
    """A set of replacements, with what was learned on the way.

    Attributes
    ----------
    chosen : dict of str to Candidate
        By layer name.
    reasons : mapping of str to str
        Why other layers stay as they are, as far as the search knows.
    times : mapping of str to mapping of Choice to LayerTime
        By layer name, of what was timed.
    alternatives : mapping of str to tuple of Alternative
        By layer name, all that was weighed.
    more_ms : mapping of str to float
        By layer name: milliseconds that replacements take more within the model than alone, where
        that was measured.
    sets : callable
        Gives sets that replace no other layers than those of some names, from mild to bold.
    evaluation : Evaluation or None
        Of the chosen set as a whole, corrected in sequence where that helps; None where the search
        didn't need it.
    sensitivities : mapping of str to Sensitivity
        By layer name, what errors of it do to the model, where that was measured.
    level : int or None
        The highest level of predicted losses that was accepted as a whole; None if none was.
    """

    chosen: Chosen
    reasons: Mapping[str, str]
    times: Mapping[str, Mapping[Choice, LayerTime]] = field(default_factory=dict)
    alternatives: Mapping[str, tuple[Alternative, ...]] = field(default_factory=dict)
    more_ms: Mapping[str, float] = field(default_factory=dict)
    sets: Callable[[Set[str]], Sequence[Chosen]] = lambda _: ()
    evaluation: Evaluation | None = None
    sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict)
    level: int | None = None

    def time(self, layer: Layer, item: Candidate) -> LayerTime | None:
        """Milliseconds of a layer and of what replaces it, each alone; None if not timed."""
        return self.times.get(layer.name, {}).get(item.choice)

    def saved_ms(self, name: str, choice: Choice) -> float | None:
        """Milliseconds that a replacement saves within the model as far as is known."""
        time = self.times.get(name, {}).get(choice)
        return None if time is None else time.saved_ms - self.more_ms.get(name, 0.0)

    def worth(self, name: str, item: Candidate) -> tuple[bool, float]:
        """Sort key of what a replacement saves: measured milliseconds first, then counted work."""
        saved = self.saved_ms(name, item.choice)
        return (True, -item.saved) if saved is None else (False, -saved)
