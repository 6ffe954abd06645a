"""What is promised of a model's loss: a limit, a confidence, and samples that have to show it."""

import math
from dataclasses import dataclass, replace

from onnxlr.verify.confidence import (
    COMPARING,
    GRADED,
    LEAST_CONFIDENCE,
    USUAL_CONFIDENCE,
    Kind,
    Losses,
    highest_confidence,
    samples_needed,
)
from onnxlr.verify.defaults import MetricChoice
from onnxlr.verify.fidelity import Quality

_IN_POINTS = ("top1", "agreement")  # metrics that are told in percentage points


@dataclass(frozen=True)
class Promise:
    """A limit of the loss, and how it is shown to hold.

    Attributes
    ----------
    metric : str
    limit : float
        Infinity for none.
    confidence : float
        In force: what was named, else 95%, or the highest that the samples can show.
    samples : int
        Number of test samples; 0 where nothing is tested.
    kind : str or None
        What a sample loses (``Losses.kind``); None where nothing is tested.
    named : bool
        Whether the user named the confidence.
    untested : str
        Why nothing is tested; empty where it is.
    choice : MetricChoice or None
        The metric and the limit, as the user named them or as they were chosen, and why.
    """

    metric: str
    limit: float
    confidence: float
    samples: int = 0
    kind: Kind | None = None
    named: bool = False
    untested: str = ""
    choice: MetricChoice | None = None

    @property
    def choice_line(self) -> str:
        """Which metric was chosen, and why; empty where the user named it."""
        return "" if self.choice is None or self.choice.named else self.choice.line

    @property
    def tested(self) -> bool:
        """Whether samples have to show that the limit holds."""
        return not self.untested

    @property
    def lowered(self) -> bool:
        """Whether the samples are too few for the usual confidence."""
        return self.tested and not self.named and self.confidence < USUAL_CONFIDENCE

    @property
    def comparing(self) -> "Promise | None":
        """The same at the least confidence there is, where the user named none; None if it is that.

        The confidence that few samples can show is that of a usual model. If the models there are
        scatter more, their means can still be compared.
        """
        if not (self.lowered and self.kind in GRADED and self.confidence > LEAST_CONFIDENCE):
            return None
        return replace(self, confidence=LEAST_CONFIDENCE)

    def shown_by(self, quality: Quality) -> bool:
        """Whether the samples of a quality show that the limit holds; always, if not tested."""
        return not self.tested or (
            bool(quality.losses)
            and all(item.shows(self.limit, self.confidence) for item in self._losses(quality))
        )

    def likely(self, quality: Quality) -> bool:
        """Whether the test samples would show the limit, if they lost as much as these."""
        return not self.tested or (
            bool(quality.losses)
            and all(
                item.would_show(self.samples, self.limit, self.confidence)
                for item in self._losses(quality)
            )
        )

    def _losses(self, quality: Quality) -> tuple[Losses, ...]:
        """Losses of the samples, with the largest that one sample is assumed to have."""
        limit = self.limit if self.tested else math.inf
        return tuple(item.bounded(limit, self.kind) for item in quality.losses)

    def hopeless(self, quality: Quality) -> bool:
        """Whether samples show, at the usual confidence, that the limit does not hold."""
        return any(item.at_least(USUAL_CONFIDENCE) > self.limit for item in self._losses(quality))

    def needed(self, quality: Quality) -> int | None:
        """About how many samples would show the limit; None if no number would."""
        numbers = [item.needed(self.limit, self.confidence) for item in self._losses(quality)]
        known = [n for n in numbers if n is not None]
        return max(known) if numbers and len(known) == len(numbers) else None

    def interval(self, quality: Quality) -> tuple[float, float] | None:
        """Ends of the true loss, each at the confidence; None where samples can't be told apart."""
        if not quality.losses:
            return None
        confidence = self.interval_confidence
        losses = self._losses(quality)
        ends = [(item.at_least(confidence), item.at_most(confidence)) for item in losses]
        return max(low for low, _ in ends), max(high for _, high in ends)

    @property
    def in_points(self) -> bool:
        """Whether losses are told in percentage points."""
        return self.metric in _IN_POINTS

    @property
    def interval_confidence(self) -> float:
        """At which the ends of intervals hold, each by itself."""
        return self.confidence if self.tested and not self._compares else USUAL_CONFIDENCE

    @property
    def _compares(self) -> bool:
        """Whether means are compared as they are, so that bounds of them would be the means."""
        return self.kind in GRADED and self.confidence <= COMPARING

    def text(self, loss: float) -> str:
        """A loss in words."""
        return loss_text(self.metric, loss)

    def lost(self, loss: float) -> str:
        """What became of a model by a loss, in words."""
        return f"lost {self.text(loss)}" if loss >= 0 else f"gained {self.text(-loss)}"

    def words(self, quality: Quality) -> str:
        """What was lost and between which ends that is; empty where samples can't be told apart."""
        if (interval := self.interval(quality)) is None:
            return ""
        ends = " to ".join(map(self.text, interval))
        return f"{self.lost(quality.drop)} ({ends}, each {self.interval_confidence:.0%})"

    @property
    def limit_text(self) -> str:
        """The limit in words."""
        return self.text(self.limit)

    def scope(self) -> str:
        """What the samples can show at all, in a sentence."""
        if not self.tested:
            return f"the limit is not tested: {self.untested}"
        at = f"at {self.confidence:.0%} confidence"
        if self.lowered:
            return (
                f"{self.samples:,} samples: loss within {self.limit_text} {at}{self._reservation()}"
            )
        if self.kind not in GRADED:
            least = 1 - (1 - self.confidence) ** (1 / self.samples)
            return f"{self.samples:,} samples can show losses down to {self.text(least)} {at}"
        return f"{self.samples:,} samples have to show a loss within {self.limit_text} {at}"

    def claim(self, quality: Quality | None) -> str:
        """What the samples show of the model that is handed over, in a sentence."""
        if not self.tested:
            return f"not tested: {self.untested}"
        if quality is None or not self.shown_by(quality):
            return self.scope()
        return (
            f"{self.samples:,} samples: loss within {self.limit_text} at {self.confidence:.0%} "
            f"confidence{self._reservation()}"
        )

    def _reservation(self) -> str:
        """What a low confidence is worth, and how many samples would do for the usual one."""
        words = ""
        if self._compares or (self.named and self.confidence <= COMPARING):
            words = ", which is no more than comparing two numbers shows"
        if self.lowered:
            words += f"; {self.enough():,} would do for {USUAL_CONFIDENCE:.0%}"
        return words

    def enough(self) -> int:
        """How many samples would do for the usual confidence, of a model that loses hardly any."""
        if self.kind not in GRADED:
            exact = samples_needed(0.0, self.limit, USUAL_CONFIDENCE)
            return -(-exact // 10) * 10 if exact > 100 else exact  # the next ten
        assert self.kind is not None
        low, high = self.samples, 2 * self.samples
        while highest_confidence(self.kind, high, self.limit) < USUAL_CONFIDENCE:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            short = highest_confidence(self.kind, middle, self.limit) < USUAL_CONFIDENCE
            low, high = (middle, high) if short else (low, middle)
        return high


def make_promise(
    metric: str,
    limit: float,
    confidence: float | None,
    kind: Kind | None,
    samples: int,
    untested: str = "",
) -> Promise:
    """What is promised with so many test samples.

    Parameters
    ----------
    metric : str
    limit : float
    confidence : float or None
        None for 95%, or the highest that the samples can show of a model without loss.
    kind : str or None
        What a sample loses; None where the metric is one number for all samples.
    samples : int
    untested : str
        Why nothing can be tested, if the caller has a reason.
    """
    if not untested and limit == float("inf"):
        untested = "there is no limit"
    if not untested and kind is None:
        untested = f"{metric} is one number for all samples"
    if not untested and limit == 0 and confidence is None:
        untested = "no number of samples shows that nothing at all is lost"
    promise = Promise(metric, limit, confidence or USUAL_CONFIDENCE, named=confidence is not None)
    if untested or kind is None:
        return replace(promise, untested=untested)
    if confidence is None:
        highest = highest_confidence(kind, samples, limit)
        promise = replace(promise, confidence=min(USUAL_CONFIDENCE, highest))
    return replace(promise, samples=samples, kind=kind)


def compared(metric: str) -> Promise:
    """Where two models are only compared: no limit, and intervals at the usual confidence."""
    return make_promise(metric, float("inf"), None, None, 0)


def loss_text(metric: str, loss: float) -> str:
    """A loss as users read it: shares in percentage points, all else as it is.

    Examples
    --------
    >>> loss_text("top1", 0.0123), loss_text("cosine", 0.0123)
    ('1.2 pp', '0.0123')
    """
    if metric not in _IN_POINTS:
        return f"{loss:.3g}"
    points = 100 * loss
    return f"{points:.1f} pp" if abs(points) >= 0.095 or points == 0 else f"{points:.1g} pp"
