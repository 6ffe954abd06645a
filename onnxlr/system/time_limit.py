"""How long a run may take, and what is left out because of it."""

import math
import time
from dataclasses import dataclass, field


@dataclass
class TimeLimit:
    """A wish for how long a run takes: stages that could go on for longer ask it.

    A run ends later where what can't be left out takes longer.

    Attributes
    ----------
    seconds : float
        Infinity for no limit.
    started : float
        On the monotonic clock.
    left_out : list of str
        What was left out, in words, each once.

    Examples
    --------
    >>> limit = TimeLimit(10.0, started=time.monotonic() - 7)
    >>> limit.allows(0.9, "tests"), limit.allows(0.5, "trials"), limit.left_out
    (True, False, ['trials'])
    """

    seconds: float = math.inf
    started: float = field(default_factory=time.monotonic)
    left_out: list[str] = field(default_factory=list)

    def allows(self, share: float, what: str) -> bool:
        """Whether less than a share of the time is over; else what follows is left out.

        Parameters
        ----------
        share : float
        what : str
            What the time would be for.
        """
        if time.monotonic() - self.started < share * self.seconds:
            return True
        if what not in self.left_out:
            self.left_out.append(what)
        return False
