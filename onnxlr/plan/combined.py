"""Low rank, the step of ``--behind``, both or neither: measured, and which of them is best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.settle import Selection
from onnxlr.plan.verdicts import Verdicts
from onnxlr.rewrite.builder import Built
from onnxlr.system.session import Session
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.judge import Judge
from onnxlr.verify.latency import MARGIN, times_in_turn
from onnxlr.verify.promise import Promise

AS_IS, LOW_RANK = "as it is", "low rank"


@dataclass(frozen=True)
class Combination:
    """One of the files that somebody may use in the end.

    Attributes
    ----------
    what : str
        What is done to the original.
    loss : float
        Against the original as it is, on the test samples.
    interval : (float, float) or None
        Ends of the true loss, each at the promised confidence; None where they aren't known.
    ms : float or None
        Median milliseconds of one run, of all rows in turn; None where nothing was timed.
    speedup : float or None
        The original's milliseconds over these.
    bytes : int
    why_not : str
        Why it is not within the limit; empty if it is.
    """

    what: str
    loss: float
    interval: tuple[float, float] | None
    ms: float | None
    speedup: float | None
    bytes: int
    why_not: str = ""


@dataclass(frozen=True)
class Combined:
    """The files that somebody may use in the end, and which of them is best.

    Attributes
    ----------
    name : str
        The step of ``--behind``.
    rows : tuple of Combination
        The original as it is; low rank without the step, as it was chosen for both; the step
        alone; and the step after low rank. Two of them where the original is handed over.
    verdict : str
        Which is best within the limit, in a sentence.
    """

    name: str
    rows: tuple[Combination, ...]
    verdict: str


def compare_combined(
    evaluator: Evaluator, selection: Selection, examiner: Judge | None, built: Built
) -> Combined | None:
    """Measure low rank and the step of ``--behind``, each with and without the other.

    Parameters
    ----------
    evaluator : Evaluator
    selection : Selection
    examiner : Judge or None
        Of the test samples; None where there are none, so that those that choose judge.
    built : Built
        What is handed over.

    Returns
    -------
    Combined or None
        None without ``--behind``.
    """
    finish, judge = evaluator.finish, examiner or evaluator.judge
    if finish is None or judge is None or evaluator.session is None or selection.quality is None:
        return None
    changed = selection.variant.changes_anything
    with evaluator.progress.stage(f"low rank, {finish.name}, both or neither", None):
        # The original loses nothing against itself.
        files: list[tuple[str, Session, int, Quality | None]] = [
            (AS_IS, evaluator.session, evaluator.original.source.nbytes, None)
        ]
        if changed:
            session = evaluator.open_as_is(built)
            files.append((LOW_RANK, session, built.nbytes, judge.judge(session)))
        alone = judge.judge(finish.session) if changed else selection.quality
        files.append((finish.name, finish.session, finish.original.nbytes, alone))
        if changed:
            both, what = evaluator.finished(built), f"{LOW_RANK}, then {finish.name}"
            session = evaluator.open_as_is(both)
            files.append((what, session, both.nbytes, selection.quality))
        times = _times(evaluator, [session for _, session, _, _ in files])
    rows = tuple(
        _row(selection.verdicts, what, quality, nbytes, ms, times[0])
        for (what, _, nbytes, quality), ms in zip(files, times, strict=True)
    )
    sized = evaluator.options.goal in ("params", "bytes")
    verdict = best_of(finish.name, rows, selection.verdicts.promise, sized=sized)
    return Combined(finish.name, rows, verdict)


def _times(evaluator: Evaluator, sessions: list[Session]) -> list[float] | list[None]:
    if not evaluator.timed or evaluator.feeding is None:
        return [None for _ in sessions]
    seconds = evaluator.limits.in_place_seconds
    return times_in_turn(sessions, evaluator.feeding.first_feed, seconds)


def _row(
    verdicts: Verdicts,
    what: str,
    quality: Quality | None,
    nbytes: int,
    ms: float | None,
    before: float | None,
) -> Combination:
    speedup = None if ms is None or before is None else before / ms
    if quality is None:
        return Combination(what, 0.0, (0.0, 0.0), ms, speedup, nbytes)
    promise = verdicts.promise
    why = verdicts.why_outside_limit(quality) or verdicts.why_not_shown(quality)
    interval = None if promise is None else promise.interval(quality)
    return Combination(what, quality.drop, interval, ms, speedup, nbytes, why or "")


def best_of(
    name: str, rows: Sequence[Combination], promise: Promise | None, *, sized: bool = False
) -> str:
    """Which row is best within the limit, in a sentence; of equals the first.

    Parameters
    ----------
    name : str
        The step of ``--behind``.
    rows : sequence of Combination
        From the original as it is, to which least was done, to both.
    promise : Promise or None
        Has the limit.
    sized : bool
        Whether bytes count, as they do where nothing was timed.
    """
    costs = [float(row.bytes) if sized or row.ms is None else row.ms for row in rows]
    fitting = [(row, cost) for row, cost in zip(rows, costs, strict=True) if not row.why_not]
    least = min(cost for _, cost in fitting)
    best = next(row for row, cost in fitting if cost <= (1 + MARGIN) * least)
    kind = "smallest" if sized or best.ms is None else "fastest"
    if promise is not None and promise.limit != math.inf:
        kind += f" within {promise.limit_text}"
    share = f"{best.bytes / rows[0].bytes:.0%} of the bytes"
    figures = share if best.speedup is None else f"{best.speedup:.2f}× as fast, {share}"
    if best.what == AS_IS:
        words = f"neither: the model as it is is the {kind}"
    elif best.what in (LOW_RANK, name):
        words = f"{best.what} alone is the {kind} ({figures})"
    else:
        words = f"both: {best.what} is the {kind} ({figures})"
    others = [f"{row.what} isn't within the limit: {row.why_not}" for row in rows if row.why_not]
    if len(rows) == 2:
        others.append(
            f"before {name} low rank gains nothing; "
            "a run without --behind shows what it gains alone"
        )
    return "; ".join([words, *others])
