"""From per-layer candidates to the boldest set of replacements that a verdict accepts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onnxlr.candidates.candidate import Candidate
from onnxlr.methods.choice import Choice
from onnxlr.plan.verdicts import put_back_reasons

Chosen = dict[str, Candidate]
WEIGHT_STEPS = (8.0, 3.0, 1.5)  # factors that a layer's predicted loss is multiplied or divided by


def choices_of(chosen: Mapping[str, Candidate]) -> dict[str, Choice]:
    """The choices of a set of candidates, without their costs."""
    return {name: item.choice for name, item in chosen.items()}


@dataclass
class Trials:
    """Asks for verdicts on sets of replacements, and stops asking after ``most`` of them.

    Parameters
    ----------
    verdict : callable
        Builds, saves and judges a set; gives None if it is accepted, else the reason.
    most : int
    may_go_on : callable
        Whether there is time for one more.
    least : int
        Sets that are asked about even where there is no time, which bisect to some result.
    """

    verdict: Callable[[Mapping[str, Candidate]], str | None]
    most: int = 14
    may_go_on: Callable[[], bool] = lambda: True
    least: int = 0
    made: int = 0
    _verdicts: dict[frozenset[tuple[str, Candidate]], str | None] = field(default_factory=dict)

    @property
    def exhausted(self) -> bool:
        """Whether no more verdicts will be asked for."""
        return self.made >= self.most or (self.made >= self.least and not self.may_go_on())

    def ask(self, chosen: Mapping[str, Candidate]) -> str | None:
        """The verdict on a set. The empty set, which changes nothing, is always accepted."""
        key = _key(chosen)
        if not chosen:
            return None
        if key not in self._verdicts:
            self.made += 1
            self._verdicts[key] = self.verdict(chosen)
        return self._verdicts[key]


@dataclass(frozen=True)
class Boldest:
    """The boldest acceptable set.

    Attributes
    ----------
    chosen : dict of str to Candidate
    refused : dict of str to str
        For each layer that a level would have replaced, and that isn't replaced: why.
    level : int
        The highest level that is accepted as a whole; -1 if none is.
    """

    chosen: Chosen
    refused: dict[str, str]
    level: int


def highest(levels: Sequence[Callable[[], Chosen]], trials: Trials, near: int | None = None) -> int:
    """The highest level of rising loss that is accepted as a whole; -1 if none is.

    Parameters
    ----------
    levels : sequence of callables
        Each gives the set of replacements of its level.
    trials : Trials
    near : int, optional
        Where it is to be expected: then it is looked for from there in growing steps, until it is
        enclosed; else by halves from the beginning.
    """
    low, high, step = -1, len(levels), 1
    while high - low > 1 and not trials.exhausted:
        at = (low + high) // 2 if near is None else near
        if trials.ask(levels[at]()) is None:
            low = at
        else:
            high = at
        if near is not None:
            near = min(low + step, len(levels) - 1) if low >= 0 else max(high - step, 0)
            near = None if low >= 0 and high < len(levels) else near
            step *= 2
    return low


def climbed(levels: Sequence[Callable[[], Chosen]], low: int, trials: Trials) -> Boldest:
    """The boldest acceptable set from a level on, each layer at its level.

    What the next level would replace more boldly is added group by group, halving what is refused.
    A layer that is refused alone stays where it is; the others climb on without it, as far as there
    are levels and trials.

    Parameters
    ----------
    levels : sequence of callables
        Each gives the set of replacements of its level.
    low : int
        The highest level that is accepted as a whole; -1 if none is.
    trials : Trials
    """
    chosen = dict(levels[low]()) if low >= 0 else {}
    stuck: dict[str, str] = {}
    for i in range(low + 1, len(levels)):
        if trials.exhausted and i > low + 1:
            break
        level = levels[i]()
        bolder = [(n, c) for n, c in level.items() if n not in stuck and _cheaper(c, chosen, n)]
        # The largest savings first: they are the first to draw on what may be lost.
        bolder.sort(key=lambda item: -item[1].saved)
        _add(chosen, bolder, trials, stuck)
    refused = {n: why for n, why in stuck.items() if n not in chosen}
    return Boldest(chosen, refused, low)


def least_damaging(
    start: Chosen,
    names: Sequence[str],
    propose: Callable[[Mapping[str, float]], Chosen | None],
    damage: Callable[[Chosen], float],
    most: int,
) -> Chosen:
    """The best of some sets of equal cost, by a damage that is measured for each as a whole.

    What was predicted of layers one by one misses how their errors act together. So the predictions
    are weighted: one layer's counts more, or less, and what the solver makes of that is measured.
    A weight that helps stays, and the next layer's is tried on top of it, first in large steps.

    Parameters
    ----------
    start : dict of str to Candidate
        What the predictions say as they are.
    names : sequence of str
        The layers whose weights are tried, in this order.
    propose : callable
        Gives the set for some weights; None if there is none.
    damage : callable
    most : int
        Sets that are measured.
    """
    weights = dict.fromkeys(names, 1.0)
    best, damages = start, {_key(start): damage(start)}
    least = damages[_key(start)]
    for step in WEIGHT_STEPS:
        for name in names:
            for factor in (step, 1 / step):
                if len(damages) >= most:
                    return best
                moved = weights | {name: weights[name] * factor}
                proposed = propose(moved)
                if proposed is None or _key(proposed) in damages:
                    continue
                reached = damages[_key(proposed)] = damage(proposed)
                if reached < least:
                    best, least, weights = proposed, reached, moved
                    break
    return best


def _key(chosen: Mapping[str, Candidate]) -> frozenset[tuple[str, Candidate]]:
    return frozenset(chosen.items())


def _cheaper(item: Candidate, chosen: Chosen, name: str) -> bool:
    return name not in chosen or item.saved > chosen[name].saved


def _add(
    chosen: Chosen,
    more: list[tuple[str, Candidate]],
    trials: Trials,
    stuck: dict[str, str],
    together: Mapping[str, str] | None = None,
) -> None:
    """Add as much of ``more`` to ``chosen`` as is accepted, halving what isn't.

    Layers for which there is no trial of their own stay for the reason that was given for them
    together with others.
    """
    if not more:
        return
    if trials.exhausted:
        for name, why in (together or {}).items():
            stuck.setdefault(name, why)
        return
    reason = trials.ask(chosen | dict(more))
    if reason is None:
        chosen.update(more)
        return
    refused = put_back_reasons([name for name, _ in more], reason)
    if len(more) == 1:
        stuck |= refused
        return
    half = len(more) // 2
    for part in (more[:half], more[half:]):
        _add(chosen, part, trials, stuck, {name: refused[name] for name, _ in part})
