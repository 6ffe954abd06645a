"""The knapsack beside brute force."""

from itertools import product

import numpy as np
import pytest

from onnxlr.candidates.fits import Candidate
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import choose_passes
from onnxlr.plan.knapsack import Option, allocate, pareto

SVD = choose_passes(("svd",))[0]


def instance(seed: int) -> tuple[dict[str, list[Option]], dict[str, float]]:
    """Up to six layers with up to four options each, some of them dominated."""
    rng = np.random.default_rng(seed)
    options, kept = {}, {}
    for i in range(int(rng.integers(2, 7))):
        kept[f"l{i}"] = float(rng.uniform(0.1, 10))
        options[f"l{i}"] = [
            Option(
                Candidate(Choice(SVD, (j + 1,)), 1, 1, 1),
                kept[f"l{i}"] * float(rng.uniform(0.1, 1.1)),
                float(10 ** rng.uniform(-6, 0)),
            )
            for j in range(int(rng.integers(0, 5)))
        ]
    return options, kept


def brute(options: dict[str, list[Option]], kept: dict[str, float]) -> list[tuple[float, float]]:
    """Cost and damage of every combination."""
    names = list(kept)
    rows = [[(kept[n], 0.0), *((o.cost, o.damage) for o in options[n])] for n in names]
    return [(sum(c for c, _ in each), sum(d for _, d in each)) for each in product(*rows)]


@pytest.mark.parametrize("seed", range(50))
def test_it_is_within_one_per_cent_of_brute_force(seed: int) -> None:
    options, kept = instance(seed)
    every = brute(options, kept)
    rng = np.random.default_rng(seed)
    most = float(10 ** rng.uniform(-5, 0))
    found = allocate(options, kept, most_damage=most)
    assert found is not None
    cost = sum(found[n].cost if n in found else k for n, k in kept.items())
    assert sum(o.damage for o in found.values()) <= most * (1 + 1e-6)
    assert cost <= min(c for c, d in every if d <= most) * 1.01

    budget = float(rng.uniform(0.3, 0.9)) * sum(kept.values())
    possible = [d for c, d in every if c <= budget]
    within = allocate(options, kept, most_cost=budget)
    assert (within is None) == (not possible)
    if within is not None:
        assert sum(within[n].cost if n in within else k for n, k in kept.items()) <= budget * (
            1 + 1e-6
        )
        damage = sum(o.damage for o in within.values())
        assert damage <= min(possible) * 1.01 + 1e-7 * max(d for _, d in every)


def test_only_options_that_nothing_beats_are_looked_at() -> None:
    item = Candidate(Choice(SVD, (1,)), 1, 1, 1)
    options = [Option(item, c, d) for c, d in ((3, 1), (2, 2), (2.5, 3), (9, 0), (1, 5))]
    assert [(o.cost, o.damage) for o in pareto(options, 8)] == [(1, 5), (2, 2), (3, 1)]


def test_nothing_to_choose_from() -> None:
    assert allocate({}, {"a": 1.0}, most_damage=1) == {}
    assert allocate({}, {"a": 1.0}, most_cost=2) == {}
    assert allocate({}, {"a": 1.0}, most_cost=0.5) is None
