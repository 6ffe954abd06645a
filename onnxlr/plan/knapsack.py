"""One choice a layer, weighed exactly against each other: the multiple-choice knapsack."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
import scipy.optimize
import scipy.sparse

from onnxlr.candidates.candidate import Candidate, by_sharing
from onnxlr.system.native_log import without_lines

# HiGHS prints this to the standard output at times, whatever it is told (HiGHS.jl issue 312).
_TRACE = "HighsMipSolverData::"
_Row = tuple[str, Candidate | None, float, float]  # a layer, what replaces it, cost, and loss


def allocate(
    candidates: Mapping[str, Sequence[Candidate]],
    as_is: Mapping[str, float],
    *,
    most_loss: float | None = None,
    most_cost: float | None = None,
    weights: Mapping[str, float] | None = None,
    families: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Candidate] | None:
    """The cheapest choice within a loss, or the least lossy one within a cost; exact.

    Solved as a mixed-integer program by HiGHS.

    Parameters
    ----------
    candidates : mapping of str to sequence of Candidate
        With cost and loss, for each layer; leaving it as it is is always possible.
    as_is : mapping of str to float
        What each layer costs as it is.
    most_loss, most_cost : float
        One of them.
    weights : mapping of str to float, optional
        How often the loss of a layer counts; once where it isn't named.
    families : mapping of str to sequence of str, optional
        The siblings of a layer, itself among them. A method that shares replaces all or none of
        them, at one rank.

    Returns
    -------
    dict of str to Candidate, or None
        The layers that change; None if the budget can't be met.
    """
    names = [name for name in as_is if candidates.get(name)]
    rows: list[_Row] = []
    for name in names:
        weight = (weights or {}).get(name, 1.0)
        rows.append((name, None, as_is[name], 0.0))
        rows += [(name, c, c.cost, c.loss * weight) for c in pareto(candidates[name], as_is[name])]
    rows, ties = _tied(rows, families or {})
    fixed = sum(cost for name, cost in as_is.items() if name not in names)
    if not rows:
        return {} if most_cost is None or fixed <= most_cost else None
    costs, losses = (np.array([row[i] for row in rows], dtype=float) for i in (2, 3))
    target, limited = (costs, losses) if most_loss is not None else (losses, costs)
    limit = most_loss if most_loss is not None else (most_cost or 0.0) - fixed
    scale = max(float(limited.max()), 1e-300)
    chosen = _solved(
        tuple((target / max(float(target.max()), 1e-300)).tolist()),
        tuple((limited / scale).tolist()),
        limit / scale,
        tuple(names.index(row[0]) for row in rows),
        tuple(ties),
    )
    if chosen is None:
        return None
    picked = [rows[i] for i in chosen]
    return {name: candidate for name, candidate, _, _ in picked if candidate is not None}


@lru_cache(maxsize=128)  # a search asks the same again and again
def _solved(
    target: tuple[float, ...],
    limited: tuple[float, ...],
    limit: float,
    which: tuple[int, ...],
    ties: tuple[tuple[int, int], ...],
) -> tuple[int, ...] | None:
    """The rows of the least sum of ``target``, one of each layer; None if there are none.

    Parameters
    ----------
    target, limited : tuple of float
        Of each row.
    limit : float
        Of the sum of ``limited``.
    which : tuple of int
        The layer of each row.
    ties : tuple of pairs of int
        Rows that come both or not at all.
    """
    count = len(target)
    one_each = scipy.sparse.csr_array((np.ones(count), (np.array(which), np.arange(count))))
    tied = []
    for pair in ties:
        equal = np.zeros((1, count))
        equal[0, pair] = 1, -1
        tied.append(scipy.optimize.LinearConstraint(scipy.sparse.csr_array(equal), 0, 0))
    solve = partial(
        scipy.optimize.milp,
        np.array(target),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(np.array(limited)[None], -np.inf, limit),
            *tied,
        ],
        bounds=scipy.optimize.Bounds(0, 1),
        integrality=np.ones(count, dtype=np.int64),
        options={"mip_rel_gap": 1e-6},
    )
    solved = without_lines(_TRACE, solve)
    return None if solved.x is None else tuple(i for i, x in enumerate(solved.x) if x > 0.5)


def _tied(
    rows: Sequence[_Row], families: Mapping[str, Sequence[str]]
) -> tuple[list[_Row], list[tuple[int, int]]]:
    """The rows without those that siblings can't share, and which of the others are tied."""
    shared: dict[tuple[object, ...], set[str]] = {}

    def key(row: _Row) -> tuple[object, ...] | None:
        name, candidate, _, _ = row
        if candidate is None or not candidate.shares:
            return None
        return tuple(families.get(name, ())), candidate.choice

    for row in rows:
        if (tie := key(row)) is not None:
            shared.setdefault(tie, set()).add(row[0])
    whole = {tie for tie, names in shared.items() if names == set(families.get(min(names), ()))}
    left = [row for row in rows if (tie := key(row)) is None or tie in whole]
    columns: dict[tuple[object, ...], list[int]] = {}
    for i, row in enumerate(left):
        if (tie := key(row)) is not None:
            columns.setdefault(tie, []).append(i)
    ties = [(first, other) for first, *others in columns.values() for other in others]
    return left, ties


def pareto(candidates: Sequence[Candidate], as_is: float) -> list[Candidate]:
    """Those that no other beats in both cost and loss, and that cost less than the layer.

    What is shared with siblings is chosen for all of them: what one of them alone would rather have
    decides nothing, and all ranks stay.
    """
    alone, shared = by_sharing([c for c in candidates if c.cost < as_is])
    best: list[Candidate] = []
    for candidate in sorted(alone, key=lambda c: (c.cost, c.loss)):
        if not best or candidate.loss < best[-1].loss:
            best.append(candidate)
    return best + shared
