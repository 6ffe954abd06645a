"""The search: bisecting levels, then putting back no more than it must."""

from collections.abc import Mapping

import pytest

from onnxlr.fits import Candidate
from onnxlr.graph_pass import choose_passes
from onnxlr.rewrite import Choice
from onnxlr.search import Trials, boldest

SVD = choose_passes(("svd",))[0]


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
    found = boldest(levels, trials)
    chosen, refused = found.chosen, found.refused
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
    found = boldest([lambda: level(10)], trials)
    chosen, refused = found.chosen, found.refused
    assert set(chosen) == {f"l{i}" for i in range(8)} - {"l3"}
    assert refused == {"l3": "put back: l3 is bad"}
    assert trials.made <= 8


def test_no_more_trials_than_allowed() -> None:
    trials = Trials(lambda chosen: "bad" if len(chosen) > 1 else None, most=5)
    found = boldest([lambda: level(10)], trials)
    chosen, refused = found.chosen, found.refused
    assert trials.made == 5
    assert set(chosen) | set(refused) == set(level(10))
    assert any("not verified within 5 trials" in why for why in refused.values())


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
    found = boldest(levels, Trials(verdict))
    assert found.chosen.pop("l3") == item(50)
    assert set(found.chosen.values()) == {item(5)}
    assert found.refused == {}
    assert found.highest == 4


def test_a_layer_that_fits_no_low_level_is_still_found() -> None:
    levels = [dict, lambda: {"a": item(9)}, lambda: {"a": item(7), "b": item(7)}]
    found = boldest(levels, Trials(lambda chosen: "a is bad" if "a" in chosen else None))
    assert found.chosen == {"b": item(7)}
    assert found.refused == {"a": "put back: a is bad"}
