"""How long a run of ONNX Runtime may last, by looks at it and not by the clock."""

import os
import time
from collections.abc import Callable

from onnxlr.errors import (
    UsageError,
)

TRIAL_VARIABLE = "ONNXLR_TRIAL"  # of the environment: seconds for what is run first, or "off"
SMALL_MODEL_SECONDS = 45.0  # seconds for opening and running what is small
_BYTES_A_SECOND = 10e6  # more for what is large
_LOOK = 1.0  # seconds between looks at what lasts


def trial_seconds(nbytes: int) -> float | None:
    """Seconds that a model of this size has to open and run; None for as long as it likes.

    Raises
    ------
    UsageError
        If ``ONNXLR_TRIAL`` is neither ``off`` nor a number of seconds.
    """
    text = os.environ.get(TRIAL_VARIABLE, "")
    if text == "off":
        return None
    if not text:
        return SMALL_MODEL_SECONDS + nbytes / _BYTES_A_SECOND
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400:
        raise UsageError(
            f"{TRIAL_VARIABLE}={text!r} is neither off nor a number of seconds up to a day"
        )
    return seconds


class Deadline:
    """So much time for something, a look after the other: who was halted on the way isn't late.

    Parameters
    ----------
    seconds : float
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = self.left = seconds

    def wait(self, look: Callable[[float], bool]) -> bool:
        """Whether it comes in time; ``look`` waits for it for some seconds."""
        while self.left > 0:
            seconds, started = min(_LOOK, self.left), time.perf_counter()
            over = look(seconds)
            self.left -= min(seconds, time.perf_counter() - started)
            if over:
                return True
        return False
