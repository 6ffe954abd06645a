"""Models of a ladder are tested from the mild end on, and the first that fails ends it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from onnxlr.errors import ModelError
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import find_pass
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.judged import Evaluation
from onnxlr.plan.ladder import Ladder, Rung
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.settle import _Qualities, _tested, settle
from onnxlr.plan.verdicts import Verdicts
from onnxlr.progress import Silent
from onnxlr.rewrite.variant import Variant
from onnxlr.verify.fidelity import Fidelity, Quality
from onnxlr.verify.judge import Judge


def quality(loss: float) -> Quality:
    return Quality("top1", 0.9, 0.9 - loss, Fidelity(0.1, 0.99, 0.99))


def ladder(count: int) -> Ladder:
    nothing, good = Proposal({}, {}), quality(0.0)
    models = [Evaluation(Variant({}, {}, i), good, 0) for i in range(count)]
    return Ladder(nothing, tuple(Rung({}, model, nothing) for model in models))


def outcome(losses: list[float | str], *, limit: float = 0.01) -> tuple[list[float], int | None]:
    """The losses of the models that hold a limit, and which is the first that doesn't.

    A word in place of a loss is the error of a model that the runtime refuses.
    """
    asked: list[int] = []

    def judge(session: Any, _: object) -> Quality:
        asked.append(session)
        loss = losses[session]
        if isinstance(loss, str):
            raise ModelError(loss)
        return quality(loss)

    def why(item: Quality) -> str | None:
        return "too much" if item.drop > limit + 1e-12 else None

    evaluator = SimpleNamespace(
        progress=Silent(),
        builder=SimpleNamespace(build=lambda variant: variant.sequential),
        open=lambda built, _: built,
    )
    verdicts = SimpleNamespace(why_outside_limit=lambda _: None, why_not_shown=why)
    arguments = cast(Evaluator, evaluator), ladder(len(losses)), cast(Verdicts, verdicts)
    qualities = _Qualities(arguments[0], cast(Judge, SimpleNamespace(judge=judge, machine=None)))
    holding, refused = _tested(*arguments, qualities)
    assert asked == list(range(len(holding) + (refused is not None)))  # and none after that
    asked.clear()
    assert _tested(*arguments, qualities)[0] == holding  # by what is known of them
    assert asked == [i for i in range(len(losses)) if losses[i] == "refused by the runtime"]
    at = None if refused is None else refused.rung.variant.sequential
    return [round(q.drop, 6) for _, q in holding], at


@pytest.mark.parametrize(
    ("losses", "holding", "refused"),
    [
        ([0.0, 0.005, 0.009], [0.0, 0.005, 0.009], None),
        ([0.0, 0.02, 0.001], [0.0], 1),  # what comes after the first that fails isn't looked at
        ([0.02, 0.0], [], 0),
        ([0.0, "refused by the runtime", 0.0], [0.0], 1),
        ([], [], None),
    ],
)
def test_the_first_that_fails_ends_it(
    losses: list[float | str], holding: list[float], refused: int | None
) -> None:
    assert outcome(losses) == (holding, refused)


def handed_over(
    losses: list[float],
    speedups: list[float],
    shown: float,
    compared: float | None,
    narrowings: Sequence[object] = (),
    timed: list[int] | None = None,
) -> tuple[int | None, float | None, str]:
    """Which model is handed over, the limit that it holds, and why the first is put back.

    Parameters
    ----------
    losses, speedups : list of float
        Of the models of the ladder.
    shown, compared : float
        Losses that hold the promise, and those that do where means are compared; None where they
        aren't.
    narrowings : sequence of object
        What models have fewer channels by; those of the original where it is empty.
    timed : list of int, optional
        Where the numbers of the models that are timed go.
    """

    def verdicts(limit: float, comparing: object) -> Any:
        def why(item: Quality) -> str | None:
            return f"more than {limit}" if item.drop > limit + 1e-12 else None

        no_doubt = SimpleNamespace(why_outside_limit=lambda _: None, why_not_shown=why)
        return SimpleNamespace(**vars(no_doubt), limit=limit, comparing=comparing)

    def compare(variant: Variant) -> Any:
        ratio = speedups[variant.sequential - 1] if variant.sequential else 1.0
        if timed is not None and variant.sequential:
            timed.append(variant.sequential - 1)
        words = "faster" if ratio > 1 else "within noise"
        return SimpleNamespace(verdict=words, speedup=ratio, low=ratio, high=ratio, doubt="")

    layers = [SimpleNamespace(name=f"layer {i}") for i in range(len(losses))]
    evaluator = SimpleNamespace(
        progress=Silent(),
        builder=SimpleNamespace(build=lambda variant: variant.sequential),
        open=lambda built, _: built,
        options=SimpleNamespace(verify="full", fraction=None, latency_vetoes=True),
        judge=SimpleNamespace(),
        rival=0,
        finish=None,
        timed=True,
        speed_of=lambda _: None,
        compare=compare,
        verdicts=verdicts(shown, None if compared is None else verdicts(compared, None)),
        prepared=SimpleNamespace(layers=layers),
        factorizer=SimpleNamespace(variant=lambda _: Variant({}, {})),
    )
    nothing = Proposal({}, {}, {layer.name: {} for layer in layers})
    choice = Choice(find_pass("svd"), (4,))
    candidate = SimpleNamespace(choice=choice)
    rungs = [
        Rung(
            cast(Any, {layer.name: candidate}),
            Evaluation(Variant({}, {}, i + 1, cast(Any, narrowing)), quality(0.0), 0),
            nothing,
        )
        for i, (layer, narrowing) in enumerate(
            zip(layers, narrowings or [None] * len(layers), strict=True)
        )
    ]
    examiner = SimpleNamespace(
        machine=None, original=0, judge=lambda session, *_: quality(([0.0, *losses])[session])
    )
    chosen = settle(
        cast(Evaluator, evaluator), Ladder(nothing, tuple(rungs)), cast(Judge, examiner)
    )
    at = chosen.variant.sequential - 1 if chosen.variant.sequential else None
    limit = None if at is None else cast(Any, chosen.verdicts).limit
    return at, limit, chosen.reasons.get("layer 0", "")


@pytest.mark.parametrize(
    ("losses", "speedups", "shown", "compared", "expected", "limit"),
    [
        ([0.0, 0.005, 0.02], [1.1, 1.2, 1.5], 0.01, None, 1, 0.01),
        ([0.0, 0.005, 0.02], [1.1, 1.2, 1.5], 0.01, 0.03, 1, 0.01),  # what is shown comes first
        ([0.006, 0.008], [1.1, 1.2], 0.004, 0.01, 1, 0.01),  # nothing is shown: means decide
        ([0.0, 0.008], [1.0, 1.2], 0.004, 0.01, 1, 0.01),  # nor of a model that is faster
        ([0.0, 0.008], [1.0, 1.2], 0.004, None, None, None),
        ([0.0, 0.008], [1.0, 1.0], 0.004, 0.01, None, None),
        ([0.0, 0.02], [1.0, 1.2], 0.004, 0.01, None, None),
    ],
)
def test_means_are_compared_where_nothing_that_is_shown_is_faster(
    losses: list[float],
    speedups: list[float],
    shown: float,
    compared: float | None,
    expected: int | None,
    limit: float | None,
) -> None:
    at, held, why = handed_over(losses, speedups, shown, compared)
    assert (at, held) == (expected, limit)
    if expected is None:
        assert "not measurably faster" in why


def test_of_one_course_two_models_are_timed_that_are_not_faster() -> None:
    class Narrowed:
        key = ()

    narrow, timed = Narrowed(), list[int]()
    courses = [narrow, None, narrow, None, narrow, None]
    slow = [1.0] * 6
    assert handed_over([0.0] * 6, slow, 0.01, None, courses, timed)[0] is None
    assert timed == [5, 4, 3, 2]
    timed.clear()
    faster = [1.0, 1.1, 1.0, 1.0, 1.0, 1.0]
    assert handed_over([0.0] * 6, faster, 0.01, None, [narrow, narrow, *[None] * 4], timed)[0] == 1
    assert timed == [5, 4, 1]
