"""The knapsack beside brute force."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from onnxlr.candidates.candidate import Candidate
from onnxlr.methods.choice import Choice
from onnxlr.methods.registry import choose_passes
from onnxlr.plan.knapsack import allocate, pareto

SVD = choose_passes(("svd",))[0]


def candidate(rank: int, cost: float, loss: float) -> Candidate:
    return Candidate(Choice(SVD, (rank,)), 1, 1, 1, cost=cost, loss=loss)


def instance(seed: int) -> tuple[dict[str, list[Candidate]], dict[str, float]]:
    """Up to six layers with up to four candidates each, some of them dominated."""
    rng = np.random.default_rng(seed)
    candidates, as_is = {}, {}
    for i in range(int(rng.integers(2, 7))):
        as_is[f"l{i}"] = float(rng.uniform(0.1, 10))
        candidates[f"l{i}"] = [
            candidate(
                j + 1,
                as_is[f"l{i}"] * float(rng.uniform(0.1, 1.1)),
                float(10 ** rng.uniform(-6, 0)),
            )
            for j in range(int(rng.integers(0, 5)))
        ]
    return candidates, as_is


def brute(
    candidates: dict[str, list[Candidate]], as_is: dict[str, float]
) -> list[tuple[float, float]]:
    """Cost and loss of every combination."""
    names = list(as_is)
    rows = [[(as_is[n], 0.0), *((c.cost, c.loss) for c in candidates[n])] for n in names]
    return [(sum(c for c, _ in each), sum(d for _, d in each)) for each in product(*rows)]


@pytest.mark.parametrize("seed", range(50))
def test_it_is_within_one_per_cent_of_brute_force(seed: int) -> None:
    candidates, as_is = instance(seed)
    every = brute(candidates, as_is)
    rng = np.random.default_rng(seed)
    most = float(10 ** rng.uniform(-5, 0))
    cheapest = allocate(candidates, as_is, most_loss=most)
    assert cheapest is not None
    cost = sum(cheapest[n].cost if n in cheapest else k for n, k in as_is.items())
    assert sum(c.loss for c in cheapest.values()) <= most * (1 + 1e-6)
    assert cost <= min(c for c, d in every if d <= most) * 1.01

    budget = float(rng.uniform(0.3, 0.9)) * sum(as_is.values())
    possible = [d for c, d in every if c <= budget]
    within = allocate(candidates, as_is, most_cost=budget)
    assert (within is None) == (not possible)
    if within is not None:
        assert sum(within[n].cost if n in within else k for n, k in as_is.items()) <= budget * (
            1 + 1e-6
        )
        loss = sum(c.loss for c in within.values())
        assert loss <= min(possible) * 1.01 + 1e-7 * max(d for _, d in every)


@pytest.mark.parametrize("seed", range(10))
def test_a_weight_counts_the_loss_of_a_layer_more_often(seed: int) -> None:
    """The choice is that of losses multiplied by hand; the losses themselves don't change."""
    candidates, as_is = instance(seed)
    weights = {name: 3.0**i for i, name in enumerate(as_is)}
    heavier = {
        name: [replace(c, loss=c.loss * weights[name]) for c in rows]
        for name, rows in candidates.items()
    }
    budget = 0.7 * sum(as_is.values())
    weighted = allocate(candidates, as_is, most_cost=budget, weights=weights)
    expected = allocate(heavier, as_is, most_cost=budget)
    assert (weighted is None) == (expected is None)
    if weighted is not None and expected is not None:
        assert {n: c.choice for n, c in weighted.items()} == {
            n: c.choice for n, c in expected.items()
        }
        assert all(c in candidates[name] for name, c in weighted.items())


def test_only_candidates_that_nothing_beats_are_looked_at() -> None:
    candidates = [candidate(1, c, d) for c, d in ((3, 1), (2, 2), (2.5, 3), (9, 0), (1, 5))]
    assert [(c.cost, c.loss) for c in pareto(candidates, 8)] == [(1, 5), (2, 2), (3, 1)]


def test_nothing_to_choose_from() -> None:
    assert allocate({}, {"a": 1.0}, most_loss=1) == {}
    assert allocate({}, {"a": 1.0}, most_cost=2) == {}
    assert allocate({}, {"a": 1.0}, most_cost=0.5) is None
