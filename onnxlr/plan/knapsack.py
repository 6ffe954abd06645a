"""One choice a layer, weighed exactly against each other: the multiple-choice knapsack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse

from onnxlr.candidates.fits import Candidate


@dataclass(frozen=True)
class Option:
    """A candidate with what it costs and what it does.

    Attributes
    ----------
    candidate : Candidate
    cost : float
        In the unit of the budget: milliseconds, multiply-accumulates, parameters or bytes.
    damage : float
        Predicted; damages of layers add up.
    """

    candidate: Candidate
    cost: float
    damage: float


def allocate(
    options: Mapping[str, Sequence[Option]],
    kept: Mapping[str, float],
    *,
    most_damage: float | None = None,
    most_cost: float | None = None,
) -> dict[str, Option] | None:
    """The cheapest choice within a damage, or the least damaging one within a cost; exact.

    Solved as a mixed-integer program by HiGHS.

    Parameters
    ----------
    options : mapping of str to sequence of Option
        For each layer; leaving it as it is is always possible.
    kept : mapping of str to float
        What each layer costs as it is.
    most_damage, most_cost : float
        One of them.

    Returns
    -------
    dict of str to Option, or None
        The layers that change; None if the budget can't be met.
    """
    names = [name for name in kept if options.get(name)]
    rows: list[tuple[str, Option | None, float, float]] = []
    for name in names:
        rows.append((name, None, kept[name], 0.0))
        rows += [(name, o, o.cost, o.damage) for o in pareto(options[name], kept[name])]
    fixed = sum(cost for name, cost in kept.items() if name not in names)
    if not rows:
        return {} if most_cost is None or fixed <= most_cost else None
    costs, damages = (np.array([row[i] for row in rows], dtype=float) for i in (2, 3))
    target, limited = (costs, damages) if most_damage is not None else (damages, costs)
    limit = most_damage if most_damage is not None else (most_cost or 0.0) - fixed
    scale = max(float(limited.max()), 1e-300)
    which = np.array([names.index(row[0]) for row in rows])
    one_each = scipy.sparse.csr_array((np.ones(len(rows)), (which, np.arange(len(rows)))))
    solved = scipy.optimize.milp(
        target / max(float(target.max()), 1e-300),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint((limited / scale)[None], -np.inf, limit / scale),
        ],
        bounds=scipy.optimize.Bounds(0, 1),
        integrality=np.ones(len(rows), dtype=np.int64),
        options={"mip_rel_gap": 1e-6},
    )
    if solved.x is None:
        return None
    taken = [row for row, x in zip(rows, solved.x, strict=True) if x > 0.5]
    return {name: option for name, option, _, _ in taken if option is not None}


def pareto(options: Sequence[Option], kept: float) -> list[Option]:
    """Those that no other beats in both cost and damage, and that cost less than the layer."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.damage)):
        if option.cost < kept and (not best or option.damage < best[-1].damage):
            best.append(option)
    return best
