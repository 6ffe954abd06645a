"""How long ONNX Runtime may take to open and run a model, and whether models are tried first."""

import os
import time
from collections.abc import Callable

from onnxlr.errors import UsageError

TRIAL_VARIABLE = "ONNXLR_TRIAL"  # environment variable: seconds for a trial, or "off"
_OFF = "off"
SMALL_MODEL_SECONDS = 45.0  # for opening and running a small model
_BYTES_A_SECOND = 10e6  # a large one has a second more for each of these
_COMPILING_TIMES = 10  # as long where it is compiled: a builder tries out kernels
_POLL_SECONDS = 1.0  # between two looks whether the work is done


def trials_enabled() -> bool:
    """Whether models that may crash are tried in the sandbox first."""
    return os.environ.get(TRIAL_VARIABLE) != _OFF


def trial_seconds(nbytes: int, *, compiles: bool = False) -> float | None:
    """Seconds that a model of this size may take to open and run; None for no limit.

    Parameters
    ----------
    nbytes : int
    compiles : bool
        Whether it is compiled meanwhile.

    Raises
    ------
    UsageError
        If ``ONNXLR_TRIAL`` is neither ``off`` nor a number of seconds.
    """
    text = os.environ.get(TRIAL_VARIABLE, "")
    if text == _OFF:
        return None
    if not text:
        seconds = SMALL_MODEL_SECONDS + nbytes / _BYTES_A_SECOND
        return seconds * (_COMPILING_TIMES if compiles else 1)
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
    """A time limit for one or several pieces of work.

    Only time spent waiting counts, at most a second between two looks: a process that was halted
    meanwhile (Ctrl-Z, a closed lid) isn't late.

    Parameters
    ----------
    seconds : float

    Attributes
    ----------
    left : float
        Seconds that are left.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = self.left = seconds

    def wait(self, is_done: Callable[[float], bool]) -> bool:
        """Wait until the work is done; returns whether that was in time.

        Parameters
        ----------
        is_done : callable
            It waits for at most the seconds it gets, and returns whether the work is done.
        """
        while self.left > 0:
            seconds, started = min(_POLL_SECONDS, self.left), time.perf_counter()
            done = is_done(seconds)
            self.left -= min(seconds, time.perf_counter() - started)
            if done:
                return True
        return False
