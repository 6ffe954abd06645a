"""Models of a ladder are tested from the mild end on, and the first that fails ends it."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from onnxlr.errors import ModelError
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.judged import Evaluation
from onnxlr.plan.ladder import Ladder, Rung
from onnxlr.plan.proposal import Proposal
from onnxlr.plan.settle import _Qualities, _tested
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
        open=lambda built: built,
    )
    verdicts = SimpleNamespace(why_outside_limit=lambda _: None, why_not_shown=why)
    arguments = cast(Evaluator, evaluator), ladder(len(losses)), cast(Verdicts, verdicts)
    qualities = _Qualities(arguments[0], cast(Judge, SimpleNamespace(judge=judge)))
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
