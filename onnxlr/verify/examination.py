"""Who judges: the samples that choose while a model is looked for, and then the test samples."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnxlr.calibrate.budget import sample_seconds
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.opening import open_session, runtime_bytes
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.system.pool import usable_cores
from onnxlr.system.providers import CPU
from onnxlr.system.session import Machine, Session
from onnxlr.verify.defaults import named_metric, with_labels_elsewhere
from onnxlr.verify.endings import Ending
from onnxlr.verify.judge import Judge
from onnxlr.verify.promise import Promise, make_promise
from onnxlr.verify.user_metric import UserMetric

# Of a sample, from which on several threads are faster, which have to be woken for every operator;
# and how many of them.
_WORTH_THREADS, _MOST_THREADS = 2e-3, 8
_SMALL = 512 << 20  # memory of a model that may be open once more


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

    def open_examiner(self, seen: float) -> Judge | None:
        """The judge of the test samples; None where nothing is tested.

        Parameters
        ----------
        seen : float
            The largest difference of a sample that choosing has shown, as ``Losses`` takes it.

        Raises
        ------
        OnnxlrError
            If the metric can't be measured on them.
        """
        judge = self.judge
        if not self.promise.tested and self.feeding.test is None:
            return None
        metric = self.promise.metric if judge.user is None else judge.user.of_part("test")
        return Judge(self.session, self.feeding.judging, metric, scale=judge.scale, seen=seen)


def judging_machine(prepared: Prepared, machine: Machine) -> Machine:
    """Where models are judged: on every core, while speed is measured on as many as are named.

    The work in a sample decides whether that pays, and not ``--jobs``: what comes out is the same
    for any number of processes.

    Parameters
    ----------
    prepared : Prepared
        The original.
    machine : Machine
        Where speed is measured.
    """
    pays = sample_seconds(prepared) >= _WORTH_THREADS
    if machine.providers != (CPU,) or not pays or runtime_bytes(prepared.model, machine) > _SMALL:
        return machine
    return replace(machine, threads=max(machine.threads, min(usable_cores(), _MOST_THREADS)))


def open_judged(prepared: Prepared, session: Session, feeding: Feeding) -> Session:
    """The original as it is judged: opened once more where that is on more threads.

    Without samples it isn't: processes judge on the few synthetic ones, on a core each.

    Parameters
    ----------
    prepared : Prepared
        The original.
    session : Session
        The original where speed is measured.
    feeding : Feeding
    """
    machine = judging_machine(prepared, session.machine)
    if feeding.fit is None or machine == session.machine:
        return session
    return open_session(prepared.source, machine)


def doubts_of(feeding: Feeding, judge: Judge | None) -> tuple[str, ...]:
    """What looks wrong with the user's samples, in sentences."""
    doubt = None if judge is None else judge.doubt
    return (*feeding.doubts, *(() if doubt is None else (doubt,)))


def examine(
    session: Session,
    feeding: Feeding,
    metric: str | None,
    max_drop: float | None,
    confidence: float | None,
    ends: Mapping[str, Ending],
) -> Examination:
    """Run the original on the samples that choose, and say what the test samples have to show.

    Parameters
    ----------
    session : Session
        The original.
    feeding : Feeding
    metric : str or None
        As ``Judge`` takes it.
    max_drop : float or None
        None for the usual limit of the metric.
    confidence : float or None
        None for the usual one, or the highest that the samples can show.
    ends : mapping of str to Ending
        How each output is made: of what the metric is chosen by, if none is named.

    Raises
    ------
    OnnxlrError
        If the metric can't be measured on these samples.
    """
    by_labels = isinstance(feeding.test, Samples) and feeding.test.labels is not None
    only_there = by_labels and isinstance(feeding.choose, Samples) and feeding.choose.labels is None
    # A sample whose answer changes loses at most that one: the search is the stricter for it.
    sought = "agreement" if only_there and metric == "top1" else metric
    by_user = sought is not None and ":" in sought
    chosen_by = UserMetric(sought, "choose") if sought is not None and by_user else sought
    judge = Judge(session, feeding.choose, chosen_by, ends=ends)
    choice = judge.choice
    if only_there and metric == "top1":
        choice = named_metric("top1")
    elif only_there and metric is None:
        choice = with_labels_elsewhere(choice, one_vector=judge.has_class_vector)
    choice = choice.limited(max_drop)
    metric = choice.name
    kind = "pairs" if metric == "top1" else judge.kind
    samples = judge.rest if by_user else 0 if feeding.test is None else len(feeding.test)
    untested = ""
    if not by_user and feeding.test is None:
        untested = (
            "one sample can't both choose and test"
            if isinstance(feeding.choose, Samples)
            else "there are no samples, and synthetic inputs show nothing of real ones"
        )
    promise = make_promise(metric, choice.max_drop, confidence, kind, samples, untested)
    return Examination(session, feeding, judge, replace(promise, choice=choice))
