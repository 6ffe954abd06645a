"""The models of all courses make one ladder, on which each is bolder and cheaper than the last."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxlr.courses import course
from onnxlr.limits import Limits
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.judged import Evaluation
from onnxlr.plan.ladder import Ladder, Rung
from onnxlr.plan.proposal import Proposal
from onnxlr.rewrite.variant import Variant
from onnxlr.verify.confidence import Losses
from onnxlr.verify.fidelity import Fidelity, Quality

NOTHING = Proposal({}, {})


def rung(loss: float, share: float, nbytes: int = 100, *, apart: float = 0.0) -> Rung:
    """A model that loses so much and, by its layers' times, costs this share of the original."""
    quality = Quality("metric", 0.9, 0.9 - loss, Fidelity(apart, 0.99, 0.99))
    variant = Variant({}, {"share": cast(Any, share)}, 0)
    return Rung({}, Evaluation(variant, quality, nbytes), NOTHING)


def evaluator(
    *, fraction: float | None = None, rungs: int = 7, by_classes: bool = False
) -> Evaluator:
    fake = SimpleNamespace(
        options=SimpleNamespace(fraction=fraction),
        limits=Limits(rungs=rungs, rungs_joined=rungs),
        promise=None,
        original=None,
        verdicts=SimpleNamespace(
            by_classes=by_classes, damage=lambda q: q.drop + q.fidelity.rel_error
        ),
    )
    return cast(Evaluator, fake)


def joined(*courses: list[Rung], **named: Any) -> list[Rung]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxlr.plan.ladder.sample_seconds", lambda _: 1e-6)
        patch.setattr(course, "_costs", lambda _, rungs: [cost(r) for r in rungs])
        ladders = [Ladder(NOTHING, tuple(rungs)) for rungs in courses]
        return list(course._joined(evaluator(**named), ladders).rungs)


def cost(item: Rung) -> tuple[float, int]:
    return cast(float, item.variant.factors["share"]), item.evaluation.nbytes


def test_a_faster_model_of_another_course_that_loses_less_is_tested() -> None:
    """So it was on the README's network: chains 2.93 times as fast went untested."""
    chains = [rung(0.001, 0.50), rung(0.003, 0.34)]
    both = [rung(0.002, 0.45), rung(0.004, 0.37), rung(0.009, 0.30)]
    assert joined(chains, both) == [chains[0], both[0], chains[1], both[2]]


def test_where_classes_are_judged_a_lucky_model_is_not_taken_for_a_mild_one() -> None:
    calm, lucky = classes(0.001, 0.003), classes(-0.002, 0.05)
    by_classes = evaluator(by_classes=True)
    assert course._risks(by_classes, [calm, lucky]) == pytest.approx([0.003, 0.05])


@pytest.mark.parametrize(("samples", "weight"), [(1_000_000, 0.0), (1, 1.0)])
def test_elsewhere_a_loss_counts_as_far_as_it_is_sure(samples: int, weight: float) -> None:
    """With many samples it is the loss; with few what models as far away lose."""
    rng = np.random.default_rng(0)
    apart, drops = np.array([0.1, 0.2, 0.3]), np.array([0.004, 0.001, 0.01])
    rungs = [
        replace(rung(drop, 0.5, apart=far), evaluation=judged(drop, far, samples, rng))
        for drop, far in zip(drops, apart, strict=True)
    ]
    usual = apart * (apart @ drops) / (apart @ apart)
    risks = course._risks(evaluator(), rungs)
    assert risks == pytest.approx(((1 - weight) * drops + weight * usual).tolist(), rel=0.05)
    assert course._risks(evaluator(), rungs)[1] < risks[2]


def test_what_gains_by_luck_is_not_milder_than_what_is_closer() -> None:
    """One of 25 pages gained more by ever bolder models, which lost more of others."""
    rng = np.random.default_rng(0)
    rungs = [
        replace(rung(drop, 0.5, apart=far), evaluation=judged(drop, far, 25, rng))
        for drop, far in ((0.0, 0.1), (-0.016, 0.3), (-0.016, 0.4), (0.0, 0.0))
    ]
    risks = course._risks(evaluator(), rungs)
    assert list(np.argsort(risks)) == [3, 0, 1, 2]


def judged(drop: float, apart: float, samples: int, rng: np.random.Generator) -> Evaluation:
    """What so many samples tell, whose losses have a standard deviation of 0.1."""
    values = drop + 0.1 * rng.permutation(np.repeat([-1.0, 1.0], max(1, samples // 2)))
    losses = (Losses("differences", values),)
    quality = Quality("metric", 1.0, 1.0 - drop, Fidelity(apart, 0.99, 0.99), losses)
    return Evaluation(Variant({}, {}), quality, 100)


def classes(loss: float, divergence: float) -> Rung:
    quality = Quality("top1", 0.9, 0.9 - loss, Fidelity(0.1, 0.99, 0.99, divergence))
    return Rung({}, Evaluation(Variant({}, {}), quality, 100), NOTHING)


@pytest.mark.parametrize(
    ("shares", "lowered", "completed"),
    [
        ((0.5, 0.55), False, (0, 1)),
        ((0.5, 0.65), False, (0,)),
        ((0.5, 0.65), True, (0, 1)),  # few samples test: the milder models are what counts
        ((0.65, 0.5), False, (1,)),
        ((0.9, None), False, (0, 1)),
    ],
)
def test_a_course_that_is_far_behind_has_no_milder_models_built(
    monkeypatch: pytest.MonkeyPatch,
    shares: tuple[float | None, ...],
    lowered: bool,
    completed: tuple[int, ...],
) -> None:
    monkeypatch.setattr(course, "_costs", lambda _, rungs: [cost(r) for r in rungs])
    monkeypatch.setattr(
        course, "with_others", lambda _, ladder: replace(ladder, rungs=(*ladder.rungs, rung(1, 0)))
    )
    begun = [
        (evaluator(), Ladder(NOTHING, () if share is None else (rung(0.01, share),)))
        for share in shares
    ]
    searched = evaluator()
    cast(Any, searched).promise = SimpleNamespace(lowered=lowered)
    ladders = course._completed(searched, begun)
    longer = [len(a.rungs) > len(b.rungs) for a, (_, b) in zip(ladders, begun, strict=True)]
    assert tuple(np.flatnonzero(longer)) == completed


def test_of_equally_costly_models_the_milder_is_tested() -> None:
    one, other = rung(0.001, 0.5, apart=0.2), rung(0.001, 0.5, apart=0.1)
    assert joined([one], [other]) == [other]
    smaller = rung(0.002, 0.5, 90, apart=0.1)
    assert joined([one], [other, smaller]) == [other, smaller]


def test_what_only_one_course_found_stays_as_it_is() -> None:
    models = [rung(0.001, 0.5), rung(0.002, 0.5), rung(0.003, 0.6)]
    assert joined(models, []) == models
    assert joined([], models) == models
    assert joined([], []) == []


def test_within_a_budget_the_course_that_loses_least_is_taken() -> None:
    one, other = [rung(0.004, 0.5)], [rung(0.003, 0.5), rung(0.003, 0.5, apart=0.002)]
    assert joined(one, other, fraction=0.5) == one
    assert joined(one, [rung(0.003, 0.5)], fraction=0.5) != one


_MODELS = st.lists(
    st.builds(rung, st.floats(-0.01, 0.05), st.floats(0.1, 1.0), st.integers(1, 5)),
    min_size=1,
    max_size=12,
)


@given(_MODELS, _MODELS, st.integers(2, 7))
def test_each_is_bolder_and_cheaper_than_the_last_and_none_is_beaten(
    one: list[Rung], other: list[Rung], most: int
) -> None:
    ladder = joined(one, other, rungs=most)
    risks, costs = course._risks(evaluator(), ladder), [cost(r) for r in ladder]
    assert risks == sorted(risks)
    assert all(a > b for a, b in itertools.pairwise(costs))
    assert 1 <= len(ladder) <= most
    every = [*one, *other]
    assert costs[-1] == min(map(cost, every))
    for item in ladder:
        (risk,) = course._risks(evaluator(), [item])
        among = zip(every, course._risks(evaluator(), every), strict=True)
        milder = [cost(r) for r, other in among if other < risk]
        assert all(c > cost(item) for c in milder)
