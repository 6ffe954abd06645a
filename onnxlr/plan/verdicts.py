"""What is said of a model's quality: outside the limit, or not shown to be within it."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from onnxlr.rewrite.builder import why_grown
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.judge import Judge
from onnxlr.verify.promise import Promise


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on qualities; each gives a reason against a model, or None.

    Attributes
    ----------
    judge : Judge or None
        Of the samples that choose; None where layers are judged one by one.
    promise : Promise or None
        What has to be shown of the loss in the end; None without a judge.
    limit : float
        The largest loss that is allowed.
    most_bytes : int
        What the file may have.
    file : str
        What that is called.
    """

    judge: Judge | None
    promise: Promise | None
    limit: float
    most_bytes: int
    file: str = "the file"

    @property
    def is_tested(self) -> bool:
        """Whether the test samples have to show that the limit holds."""
        return self.promise is not None and self.promise.tested

    @property
    def comparing(self) -> "Verdicts | None":
        """The same with a promise of the least confidence; None where that changes nothing."""
        promise = None if self.promise is None else self.promise.comparing
        return None if promise is None else replace(self, promise=promise)

    @property
    def by_classes(self) -> bool:
        """Whether class probabilities count, not the outputs' numbers: what a metric looks at."""
        judge = self.judge
        return (
            judge is not None and judge.has_class_vector and judge.metric in ("top1", "agreement")
        )

    def damage(self, quality: Quality) -> float:
        """What the metric loses and what the outputs do, together.

        The metric is what counts; on few samples it moves in steps, and how far the outputs get
        tells such models apart.
        """
        fidelity = quality.fidelity
        apart = (fidelity.divergence or 0.0) if self.by_classes else fidelity.rel_error
        return quality.drop + apart

    def too_large(self, nbytes: int) -> str | None:
        """Why a file is larger than allowed, which is as large as the original."""
        return why_grown(nbytes, self.most_bytes, self.file)

    def why_outside_limit(self, quality: Quality) -> str | None:
        """Why the loss on these samples is outside the limit."""
        if (why := self._why_broken(quality)) is not None:
            return why
        # The tolerance is for the last bit of a difference of two shares, no more.
        if quality.drop > self.limit + 1e-12:
            direction = "rise to" if quality.metric == "rel-error" else "drop by"
            return (
                f"{quality.metric} would {direction} {quality.drop:.4g}, the limit is "
                f"{self.limit:g}"
            )
        return None

    def why_ruled_out(self, quality: Quality) -> str | None:
        """Why a model has no chance, by the samples that choose.

        Where test samples follow, these have to show that it is outside the limit.
        """
        if self.promise is None or not self.promise.tested or not quality.losses:
            return self.why_outside_limit(quality)
        if (why := self._why_broken(quality)) is not None:
            return why
        return self.why_outside_limit(quality) if self.promise.hopeless(quality) else None

    def why_unlikely(self, quality: Quality) -> str | None:
        """Why the search shouldn't go on from a model, by the samples that choose.

        Where test samples follow, as many as those would have to show that the limit holds.
        """
        promise = self.promise
        if promise is None or not promise.tested or not quality.losses:
            return self.why_outside_limit(quality)
        if (why := self._why_broken(quality)) is not None:
            return why
        if promise.likely(quality):
            return None
        return self.why_outside_limit(quality) or (
            f"{quality.metric} {promise.lost(quality.drop)} on the samples used for choosing: the "
            f"{promise.samples:,} test samples would hardly show that it is within "
            f"{promise.limit_text}"
        )

    def why_not_shown(self, quality: Quality) -> str | None:
        """Why the test samples don't show that the limit holds; None if they needn't."""
        promise = self.promise
        if promise is None or promise.shown_by(quality):
            return None
        interval, needed = promise.interval(quality), promise.needed(quality)
        at_most = "" if interval is None else f" (at most {promise.text(interval[1])})"
        return (
            f"{quality.metric} {promise.lost(quality.drop)}{at_most} on "
            f"{promise.samples:,} samples, which doesn't show at {promise.confidence:.0%} "
            f"confidence that it is within {promise.limit_text}"
            + (f"; about {needed:,} samples would" if needed is not None else "")
        )

    def _why_broken(self, quality: Quality) -> str | None:
        """Why nothing good can be said of a model, whatever its metric is."""
        if self.judge is not None and self.judge.sees_nothing:
            return "the original gives nothing but NaN and infinities on the inputs that judge"
        if not math.isfinite(quality.fidelity.rel_error):
            return "an output would be NaN or infinite where the original's isn't, or the reverse"
        if not quality.fidelity.same_shapes and not (self.judge and self.judge.may_reshape):
            return (
                "an output would differ in shape, which only a metric of yours can judge: "
                "--metric module:function"
            )
        return None


def put_back_reasons(names: Collection[str], why: str) -> dict[str, str]:
    """The reason for each layer that a trial put back, by name; a joint one is called so.

    Examples
    --------
    >>> put_back_reasons(["a", "b"], "slower")["a"]
    'put back together with 1 other: slower'
    """
    others = len(names) - 1
    together = "" if not others else f" together with {others} other{'s' if others > 1 else ''}"
    return dict.fromkeys(names, f"put back{together}: {why}")
