"""Metrics: the names that are built in, their values, and metrics that are the user's functions."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxlr.errors import UsageError, one_line
from onnxlr.verify.fidelity import Fidelity

METRICS = ("top1", "agreement", "rel-error", "cosine")


@dataclass(frozen=True)
class Shares:
    """How many arg-max classes were compared, and how many of them agree or are right.

    Attributes
    ----------
    count : int
        Classes compared, one or more.
    agree : int
        Those in which the candidate agrees with the original.
    right_before, right : int
        Those that are the label's, by the original and by the candidate.
    """

    count: int
    agree: int
    right_before: int
    right: int


def metric_values(metric: str, shares: Shares, fidelity: Fidelity) -> tuple[float, float]:
    """The values of a built-in metric for the original and for the candidate.

    A new metric gets its name in ``METRICS``, its values here, and in ``Quality.drop`` the
    direction in which it is better.
    """
    values = {
        "top1": (shares.right_before / shares.count, shares.right / shares.count),
        "agreement": (1.0, shares.agree / shares.count),
        "rel-error": (0.0, fidelity.rel_error),
        "cosine": (1.0, fidelity.cosine),
    }
    return values[metric]


def user_metric(text: str) -> Callable[[Any], float]:
    """The function that ``module:function`` names; modules of the working folder are seen.

    Raises
    ------
    UsageError
        If it can't be imported, or is no function.
    """
    module, _, name = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module of the user's may do anything
        raise UsageError(f"--metric {text!r} can't be imported: {one_line(error)}") from None
    finally:
        os.chdir(here)
    if not callable(function):
        raise UsageError(f"--metric {text!r} is not a function")
    return function  # type: ignore[no-any-return]
