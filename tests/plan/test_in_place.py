"""Layers that save less within the model than alone, or more, and the choice that follows."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from onnxlr.candidates.candidate import Candidate
from onnxlr.layers.layer import Layer
from onnxlr.limits import Limits
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import choose_passes
from onnxlr.plan import in_place
from onnxlr.plan.choose import _searched_in_place
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.in_place import corrected, time_in_place
from onnxlr.plan.tradeoff import LayerTradeoff, Tradeoff
from onnxlr.progress import Silent
from onnxlr.rewrite.variant import Variant
from onnxlr.system.session import Machine
from onnxlr.system.time_limit import TimeLimit

SVD = choose_passes(("svd",))[0]
ALONE = {4: 0.3, 8: 0.5, 16: 0.8}  # milliseconds by rank, of a layer that takes 1
REST = 1.0  # milliseconds of what no layer is
NAMES = ("a", "b", "c")

MoreMs = Callable[[Mapping[str, Choice]], float]  # what the set takes more than its layers alone


def item(rank: int) -> Candidate:
    choice = Choice(SVD, (rank,))
    return Candidate(choice, rank, rank, 100 - rank, "", 1 / rank, ALONE[rank], 1 / rank)


def tradeoff() -> Tradeoff:
    """Three layers of 1 ms, with three candidates each."""
    items = tuple(item(rank) for rank in ALONE)
    layer = cast(Layer, None)
    return Tradeoff({n: LayerTradeoff(layer, 1.0, items, items, {}, None, "") for n in NAMES})


def evaluator(
    patch: pytest.MonkeyPatch, more: MoreMs, provider: str = "cpu", **limits: Any
) -> Evaluator:
    """Of a machine on which models take the times of their layers, and what ``more`` says."""

    def ms(variant: Variant) -> float:
        alone = sum(ALONE[c.rank[0]] - 1 for c in variant.choices.values())
        return REST + len(NAMES) + alone + more(variant.choices)

    def turns(sessions: Sequence[Variant], *_: Any) -> list[float]:
        return [ms(variant) for variant in sessions]

    patch.setattr(in_place, "times_in_turn", turns)
    fake = SimpleNamespace(
        factorizer=SimpleNamespace(variant=lambda choices: Variant(choices, {})),
        narrowing=None,
        progress=Silent(),
        original=SimpleNamespace(source=SimpleNamespace(nbytes=10)),
        feeding=SimpleNamespace(first_feed={}),
        limits=Limits(**limits),
        options=SimpleNamespace(latency_vetoes=True, latency_table=None, machine=Machine(provider)),
        timed=True,
        time=TimeLimit(1e9),
        open_variant=lambda variant: variant,
    )
    return cast(Evaluator, fake)


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


CHOSEN = {"a": item(4), "b": item(8)}


def test_layers_are_timed_one_by_one_where_the_whole_is_not_their_sum(
    patch: pytest.MonkeyPatch,
) -> None:
    found = time_in_place(evaluator(patch, lambda c: 0.6 * ("b" in c)), tradeoff(), CHOSEN)
    assert found is not None
    assert found.predicted_ms == pytest.approx(4 - 0.7 - 0.5)
    assert found.measured_ms == pytest.approx(4 - 0.7 - 0.5 + 0.6)
    assert found.saved_ms == pytest.approx({"a": 0.7, "b": -0.1})


@pytest.mark.parametrize("more", [0.0, 0.25, -0.25])
def test_they_are_not_where_the_prediction_is_right_within_a_tenth(
    patch: pytest.MonkeyPatch, more: float
) -> None:
    assert time_in_place(evaluator(patch, lambda _: more), tradeoff(), CHOSEN) is None


def test_a_provider_that_compiles_has_them_timed_though_their_sum_is_right(
    patch: pytest.MonkeyPatch,
) -> None:
    """What one layer loses by fusion another gains: b takes 0.4 ms more, and a 0.4 ms less."""

    def more(choices: Mapping[str, Choice]) -> float:
        return 0.4 * ("b" in choices) - 0.4 * ("a" in choices)

    for provider in ("cpu", "cuda"):
        assert time_in_place(evaluator(patch, more, provider), tradeoff(), CHOSEN) is None
    found = time_in_place(evaluator(patch, more, "openvino"), tradeoff(), CHOSEN)
    assert found is not None
    assert found.saved_ms == pytest.approx({"a": 1.1, "b": 0.1})


def test_what_saves_nothing_in_place_is_not_chosen_again(patch: pytest.MonkeyPatch) -> None:
    found = time_in_place(evaluator(patch, lambda c: 0.8 * ("b" in c)), tradeoff(), CHOSEN)
    assert found is not None
    after = corrected(tradeoff(), found, CHOSEN)
    assert [c.cost for c in after.layers["a"].candidates] == pytest.approx([0.3, 0.5, 0.8])
    assert after.layers["a"].more_ms == pytest.approx(0)
    assert after.layers["b"].candidates == ()
    assert "not faster within the model" in str(after.layers["b"].why_kept())
    assert "0.8" in after.layers["b"].reason
    assert after.layers["c"].more_ms == 0


def test_what_saves_less_in_place_is_chosen_at_another_rank(patch: pytest.MonkeyPatch) -> None:
    found = time_in_place(evaluator(patch, lambda c: 0.4 * ("b" in c)), tradeoff(), CHOSEN)
    assert found is not None
    costs = {
        c.choice.rank[0]: c.cost
        for c in corrected(tradeoff(), found, CHOSEN).layers["b"].candidates
    }
    assert costs == pytest.approx({4: 0.7, 8: 0.9})  # at rank 16 it would take longer than it does


def test_many_layers_are_timed_in_groups_beside_the_same_whole(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(in_place, "_AT_ONCE", 2)
    chosen = {**CHOSEN, "c": item(16)}
    found = time_in_place(evaluator(patch, lambda c: 0.5 * len(c)), tradeoff(), chosen)
    assert found is not None
    assert found.saved_ms == pytest.approx({"a": 0.2, "b": 0.0, "c": -0.3})


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_the_search_goes_on_with_corrected_costs(patch: pytest.MonkeyPatch, rounds: int) -> None:
    """Layer b alone saves most and in the model nothing: a search that doesn't know takes it."""
    whole = evaluator(patch, lambda c: 0.9 * ("b" in c), in_place_rounds=rounds)
    asked: list[set[str]] = []

    def verdict(_: Evaluator, chosen: Mapping[str, Candidate]) -> None:
        asked.append(set(chosen))

    patch.setattr("onnxlr.plan.choose._verdict", verdict)
    patch.setattr("onnxlr.plan.choose._most_trials", lambda _: 8)
    result, after = _searched_in_place(whole, tradeoff())
    assert ("b" in result.chosen) == (rounds == 0)
    assert {"a", "c"} <= set(result.chosen)
    assert set(NAMES) in asked
    assert (after.layers["b"].more_ms > 0.8) == (rounds > 0)


def test_with_a_named_table_nothing_is_timed_in_place(patch: pytest.MonkeyPatch) -> None:
    """The same table has to give the same plan."""
    named = evaluator(patch, lambda _: 5.0)
    options = SimpleNamespace(latency_vetoes=True, latency_table="t.json")
    fake = SimpleNamespace(timed=True, options=options)
    assert in_place.is_timed_in_place(named)
    assert not in_place.is_timed_in_place(cast(Evaluator, fake))
    vetoless = SimpleNamespace(timed=True, options=replace_options(options))
    assert not in_place.is_timed_in_place(cast(Evaluator, vetoless))


def replace_options(options: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(options), "latency_table": None, "latency_vetoes": False})
