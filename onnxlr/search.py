"""From per-layer candidates to the boldest set of replacements that a verdict accepts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onnxlr.plan import Candidate

Chosen = dict[str, Candidate]
MOST_TRIALS = 40


@dataclass
class Trials:
    """Asks for verdicts on sets of replacements, and stops asking after ``most`` of them.

    Parameters
    ----------
    verdict : callable
        Builds, saves and judges a set; gives None if it is accepted, else the reason.
    most : int
    """

    verdict: Callable[[Mapping[str, Candidate]], str | None]
    most: int = MOST_TRIALS
    made: int = 0
    _known: dict[frozenset[tuple[str, Candidate]], str | None] = field(default_factory=dict)

    @property
    def exhausted(self) -> bool:
        """Whether no more verdicts will be asked for."""
        return self.made >= self.most

    def ask(self, chosen: Mapping[str, Candidate]) -> str | None:
        """The verdict on a set. The empty set, which changes nothing, is always accepted."""
        key = frozenset(chosen.items())
        if not chosen:
            return None
        if key not in self._known:
            self.made += 1
            self._known[key] = self.verdict(chosen)
        return self._known[key]


def boldest(
    levels: Sequence[Callable[[], Chosen]], trials: Trials
) -> tuple[Chosen, dict[str, str]]:
    """The boldest acceptable set among levels of rising damage, mixed at the edge.

    Bisects for the highest level that is accepted as a whole, then adds what the next level would
    replace more boldly, layer group by layer group, as far as the verdict allows.

    Parameters
    ----------
    levels : sequence of callables
        Each gives the set of replacements of its level.
    trials : Trials

    Returns
    -------
    chosen : dict of str to Candidate
    refused : dict of str to str
        For each layer that a bolder level would have replaced: why it isn't.
    """
    sets: dict[int, Chosen] = {}

    def level(i: int) -> Chosen:
        if i not in sets:
            sets[i] = levels[i]()
        return sets[i]

    low, high = -1, len(levels)
    while high - low > 1 and not trials.exhausted:
        middle = (low + high) // 2
        if trials.ask(level(middle)) is None:
            low = middle
        else:
            high = middle
    chosen = dict(level(low)) if low >= 0 else {}
    refused: dict[str, str] = {}
    if high < len(levels):
        bolder = [(n, c) for n, c in level(high).items() if chosen.get(n) != c]
        bolder.sort(key=lambda item: item[1].error)
        _add(chosen, bolder, trials, refused)
    return chosen, {n: why for n, why in refused.items() if n not in chosen}


def _add(
    chosen: Chosen, more: list[tuple[str, Candidate]], trials: Trials, refused: dict[str, str]
) -> None:
    """Add as much of ``more`` to ``chosen`` as is accepted, halving what isn't."""
    if not more:
        return
    if trials.exhausted:
        for name, _ in more:
            refused.setdefault(name, f"put back: not verified within {trials.most} trials")
        return
    attempt = chosen | dict(more)
    reason = trials.ask(attempt)
    if reason is None:
        chosen.update(more)
    elif len(more) == 1:
        refused[more[0][0]] = f"put back: {reason}"
    else:
        half = len(more) // 2
        _add(chosen, more[:half], trials, refused)
        _add(chosen, more[half:], trials, refused)
