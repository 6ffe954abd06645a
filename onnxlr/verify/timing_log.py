"""The timings of a run in words: how busy the machine was, and what stayed undecided."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from onnxlr.verify.latency import Comparison, busy_words
from onnxlr.verify.layer_latency import LayerTime
from onnxlr.verify.rounds import BUSY

_CROWDED = 0.3  # mean share of the time that timings of a run waited
_NAMED = 5  # layers that a line names; the others are counted


@dataclass
class TimingLog:
    """The comparisons of layers with their replacements that a run made.

    Attributes
    ----------
    waits : list of float
        Of each, the share of its time that was spent waiting for other processes.
    undecided : Counter of str
        By layer name, replacements that may be faster or not.
    """

    waits: list[float] = field(default_factory=list)
    undecided: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, time: LayerTime) -> None:
        """Add the comparison of a layer with a replacement."""
        self.waits.append(time.busy)
        self.undecided[name] += not (time.settled or time.faster)

    @property
    def crowded(self) -> bool:
        """Whether timings waited so long that even one that didn't tells little."""
        return bool(self.waits) and sum(self.waits) > _CROWDED * len(self.waits)

    def line(self, models: Sequence[Comparison]) -> str | None:
        """That the machine was busy, and what wasn't decided because of it; None if all was well.

        Parameters
        ----------
        models : sequence of Comparison
            Of the original with what was made of it.
        """
        waits = [*self.waits, *(speed.busy for speed in models)]
        busy = sum(waits) / len(waits) if waits else 0.0
        still_open = self._open_layers() + _open_models([s for s in models if s.undecided])
        if still_open:
            return (
                f"{busy_words(busy)}. Undecided, and so not used: {' and '.join(still_open)}. A "
                "quieter machine may find more"
            )
        if busy > BUSY:
            return f"{busy_words(busy)}. It was decided all the same what is faster"
        return None

    def _open_layers(self) -> list[str]:
        names = [name for name, count in self.undecided.items() if count]
        if not names:
            return []
        more = f" and {len(names) - _NAMED} more layers" if len(names) > _NAMED else ""
        count = self.undecided.total()
        return [f"{count} replacement{'s' * (count > 1)} of {', '.join(names[:_NAMED])}{more}"]


def _open_models(models: Sequence[Comparison]) -> list[str]:
    """Whole models that may be faster or not, in words."""
    if len(models) > 1:
        ratios = [speed.speedup for speed in models]
        return [f"{len(models)} whole models ({min(ratios):.2f}× to {max(ratios):.2f}×)"]
    return [
        f"a whole model ({speed.speedup:.2f}×, 95% {speed.low:.2f} to {speed.high:.2f})"
        for speed in models
    ]
