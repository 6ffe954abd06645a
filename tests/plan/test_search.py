"""The search: bisecting levels, then putting back no more than it must."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import pytest

from onnxlr.candidates.candidate import Candidate
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import choose_passes
from onnxlr.plan.search import (
    WEIGHT_STEPS,
    Boldest,
    Chosen,
    Trials,
    climbed,
    highest,
    least_damaging,
)

SVD = choose_passes(("svd",))[0]


def boldest(levels: Sequence[Callable[[], Chosen]], trials: Trials) -> Boldest:
    return climbed(levels, highest(levels, trials), trials)


def item(rank: int) -> Candidate:
    return Candidate(Choice(SVD, (rank,)), params=rank, macs=rank, saved=1000 - rank)


def level(rank: int, layers: int = 8) -> dict[str, Candidate]:
    return {f"l{i}": item(rank) for i in range(layers)}


def damage(chosen: Mapping[str, Candidate]) -> int:
    return sum(100 // c.choice.rank[0] for c in chosen.values())


@pytest.mark.parametrize("limit", [0, 7, 24, 50, 100, 200, 1000])
def test_stays_within_the_limit_and_near_it(limit: int) -> None:
    trials = Trials(lambda chosen: None if damage(chosen) <= limit else "too much")
    levels = [lambda r=r: level(r) for r in (100, 50, 25, 10, 5)]
    result = boldest(levels, trials)
    chosen, refused = result.chosen, result.refused
    assert damage(chosen) <= limit
    assert set(refused) == {n for n in refused if n not in chosen}
    # Nothing it refused could still have been added at the next level.
    bolder = {100: 50, 50: 25, 25: 10, 10: 5}
    for name, kept in chosen.items():
        rank = bolder.get(kept.choice.rank[0])
        if (
            rank is not None
            and len({c.choice.rank for c in chosen.values()}) > 1
            and rank >= min(c.choice.rank[0] for c in chosen.values())
        ):
            assert damage(chosen | {name: item(rank)}) > limit


def test_one_bad_layer_alone_is_put_back() -> None:
    trials = Trials(lambda chosen: "l3 is bad" if "l3" in chosen else None)
    result = boldest([lambda: level(10)], trials)
    chosen, refused = result.chosen, result.refused
    assert set(chosen) == {f"l{i}" for i in range(8)} - {"l3"}
    assert refused == {"l3": "put back: l3 is bad"}
    assert trials.made <= 8


def test_no_more_trials_than_allowed() -> None:
    trials = Trials(lambda chosen: "bad" if len(chosen) > 1 else None, most=5)
    result = boldest([lambda: level(10)], trials)
    chosen, refused = result.chosen, result.refused
    assert trials.made == 5
    assert set(chosen) | set(refused) == set(level(10))
    assert all(why.startswith("put back") and why.endswith("bad") for why in refused.values())
    assert any("together with 1 other" in why for why in refused.values())  # with whom it was tried


@pytest.mark.parametrize("limit", [0, 7, 24, 50, 100, 200, 1000])
@pytest.mark.parametrize("near", range(9))
def test_the_highest_level_is_the_same_wherever_it_is_looked_for(limit: int, near: int) -> None:
    ranks = (100, 80, 64, 50, 25, 16, 10, 7, 5)
    levels = [lambda r=r: level(r) for r in ranks]

    def verdict(chosen: Mapping[str, Candidate]) -> str | None:
        return None if damage(chosen) <= limit else "too much"

    wanted = max((i for i, r in enumerate(ranks) if damage(level(r)) <= limit), default=-1)
    trials = Trials(verdict)
    assert highest(levels, Trials(verdict)) == highest(levels, trials, near) == wanted
    if wanted == near:  # it and the next are asked about, if there is a next
        assert trials.made == min(2, len(ranks) - near)


def test_some_trials_are_made_even_where_there_is_no_time() -> None:
    """Else a run on a busy machine would end with nothing."""
    levels = [lambda r=r: level(r) for r in (100, 50, 25, 10, 5)]

    def verdict(chosen: Mapping[str, Candidate]) -> str | None:
        return None if damage(chosen) <= 32 else "too much"

    late = Trials(verdict, 20, lambda: False, least=3)
    assert boldest(levels, late).chosen == level(25)
    assert late.made == 3
    none = Trials(verdict, 20, lambda: False)
    assert boldest(levels, none).chosen == {}
    assert none.made == 0


def test_the_same_set_is_judged_once() -> None:
    trials = Trials(lambda _: "bad")
    trials.ask(level(3))
    trials.ask(level(3))
    assert trials.made == 1
    assert trials.ask({}) is None


def test_one_sensitive_layer_holds_nobody_back() -> None:
    def verdict(chosen: Mapping[str, Candidate]) -> str | None:
        return "l3 is touchy" if "l3" in chosen and chosen["l3"].choice.rank[0] < 50 else None

    levels = [lambda r=r: level(r) for r in (100, 50, 25, 10, 5)]
    result = boldest(levels, Trials(verdict))
    assert result.chosen.pop("l3") == item(50)
    assert set(result.chosen.values()) == {item(5)}
    assert result.refused == {}
    assert result.level == 1


def test_a_layer_that_fits_no_low_level_is_still_found() -> None:
    levels = [dict, lambda: {"a": item(9)}, lambda: {"a": item(7), "b": item(7)}]
    result = boldest(levels, Trials(lambda chosen: "a is bad" if "a" in chosen else None))
    assert result.chosen == {"b": item(7)}
    assert result.refused == {"a": "put back: a is bad"}


RANKS = (1, 2, 3, 4, 6, 8, 12, 16)


def shared_out(weights: Mapping[str, float]) -> dict[str, Candidate]:
    """The best of all ways to share 24 ranks out, as predicted from weights."""
    names = sorted(weights)
    ways = [w for w in product(RANKS, repeat=len(names)) if sum(w) <= 24]
    best = min(ways, key=lambda w: sum(weights[n] / r for n, r in zip(names, w, strict=True)))
    return {n: item(r) for n, r in zip(names, best, strict=True)}


def truth(chosen: Mapping[str, Candidate]) -> float:
    """Layer b counts ten times what is predicted, and c next to nothing."""
    ranks = {n: c.choice.rank[0] for n, c in chosen.items()}
    return 1 / ranks["a"] + 10 / ranks["b"] + 0.1 / ranks["c"]


def test_wrong_predictions_are_put_right() -> None:
    names = ["a", "b", "c"]
    start = shared_out(dict.fromkeys(names, 1.0))
    measured: list[float] = []

    def damage(chosen: Mapping[str, Candidate]) -> float:
        measured.append(truth(chosen))
        return measured[-1]

    asked: list[Mapping[str, float]] = []

    def propose(weights: Mapping[str, float]) -> dict[str, Candidate]:
        asked.append(weights)
        return shared_out(weights)

    best = least_damaging(start, names, propose, damage, 40)
    least = min(
        truth({n: item(r) for n, r in zip(names, w, strict=True)})
        for w in product(RANKS, repeat=3)
        if sum(w) <= 24
    )
    assert truth(best) == min(measured) <= 1.05 * least < truth(start)
    assert len(measured) <= 40
    assert max(w for weights in asked for w in weights.values()) > max(WEIGHT_STEPS)
    measured.clear()
    few = least_damaging(start, names, shared_out, damage, 3)
    assert len(measured) == 3
    assert truth(few) == min(measured)
    assert least_damaging(start, names, lambda _: None, damage, 9) == start


@pytest.mark.parametrize("seed", range(8))
def test_the_best_that_was_measured_is_taken(seed: int) -> None:
    rng, measured = np.random.default_rng(seed), dict[float, Mapping[str, Candidate]]()

    def damage(chosen: Mapping[str, Candidate]) -> float:
        loss = float(rng.uniform(0.9, 1.0))
        measured[loss] = chosen
        return loss

    names = ["a", "b", "c"]
    best = least_damaging(shared_out(dict.fromkeys(names, 1.0)), names, shared_out, damage, 40)
    assert best == measured[min(measured)]
    assert len(measured) > 3
