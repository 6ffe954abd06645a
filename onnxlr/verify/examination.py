"""Who judges: the samples that choose while a model is looked for, and those that test it."""

from dataclasses import dataclass

from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.samples import Samples
from onnxlr.system.session import Session
from onnxlr.verify.judge import Judge
from onnxlr.verify.promise import Promise, make_promise


@dataclass(frozen=True)
class Examination:
    """A judge to choose by, what is promised, and a judge who comes in when all is chosen.

    Attributes
    ----------
    session : Session
        The original.
    feeding : Feeding
    judge : Judge
        Of the samples that choose.
    promise : Promise
    """

    session: Session
    feeding: Feeding
    judge: Judge
    promise: Promise

    def open_examiner(self) -> Judge | None:
        """The judge of the samples that test; None where nothing is tested.

        Raises
        ------
        OnnxlrError
            If the metric can't be measured on them.
        """
        judge = self.judge
        if not self.promise.tested and self.feeding.test is None:
            return None
        return Judge(
            self.session, self.feeding.judging, self.promise.metric, part="test", scale=judge.scale
        )


def examine(
    session: Session,
    feeding: Feeding,
    metric: str | None,
    max_drop: float,
    confidence: float | None,
) -> Examination:
    """Run the original on the samples that choose, and say what those that test have to show.

    Parameters
    ----------
    session : Session
        The original.
    feeding : Feeding
    metric : str or None
        As ``Judge`` takes it.
    max_drop : float
    confidence : float or None
        None for the usual one, or the highest that the samples can show.

    Raises
    ------
    OnnxlrError
        If the metric can't be measured on these samples.
    """
    by_labels = isinstance(feeding.test, Samples) and feeding.test.labels is not None
    only_there = by_labels and isinstance(feeding.choose, Samples) and feeding.choose.labels is None
    if only_there and metric in (None, "top1"):
        # A sample whose answer changes loses at most that one: the search is the stricter for it.
        judge, metric = Judge(session, feeding.choose, "agreement", part="choose"), "top1"
    else:
        judge = Judge(session, feeding.choose, metric, part="choose")
        metric = judge.metric
    kind, by_user = "pairs" if only_there else judge.kind, ":" in metric
    samples = judge.rest if by_user else 0 if feeding.test is None else len(feeding.test)
    untested = ""
    if not by_user and feeding.test is None:
        untested = (
            "one sample can't both choose and test"
            if isinstance(feeding.choose, Samples)
            else "there are no samples, and synthetic inputs show nothing of real ones"
        )
    promise = make_promise(metric, max_drop, confidence, kind, samples, untested)
    return Examination(session, feeding, judge, promise)
