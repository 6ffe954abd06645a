"""Metrics that are the user's functions: imported, called, and what they give is checked."""

import warnings
from collections.abc import Hashable
from copy import copy
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxlr.errors import DataError, one_line
from onnxlr.system.session import Session
from onnxlr.system.user_function import foreign_call, import_function

Part = Literal["choose", "test"]

_SPLIT = 0  # seed of the halves of a metric's samples, and of noise
_BLUR = 0.25  # of an output's standard deviation: that of the noise which shows what losses may be


class UserMetric:
    """A function of a session that gives a number, or one for each sample; higher is better.

    Its samples are the function's. Where it gives a number for each, one half of them chooses and
    the other one tests, so that they are as many each time and in the same order.

    Parameters
    ----------
    text : str
        ``module:function``; modules of the working folder are seen.
    part : {"choose", "test"} or None
        The samples that count; None for all.

    Raises
    ------
    UsageError
        If it can't be imported, or is no function.
    """

    def __init__(self, text: str, part: Part | None = None) -> None:
        self.name, self._part = text, part
        self._function = import_function(text, "--metric")
        self._values: dict[Hashable, NDArray[np.float64]] = {}
        self._graded: bool | None = None
        self.samples = 0  # of both parts, as soon as it was called

    @property
    def rest(self) -> int:
        """Samples of the other part, as soon as it was called."""
        half = self.samples // 2
        return {"test": half, "choose": self.samples - half, None: 0}[self._part]

    def of_part(self, part: Part) -> "UserMetric":
        """The same function for another part; it isn't called anew for models that it has seen."""
        other = copy(self)
        other._part = part
        return other

    def __call__(self, session: Session, model: Hashable = None) -> NDArray[np.float64]:
        """What it gives: of no dimension, or one number for each sample of the part.

        Parameters
        ----------
        session : Session
        model : hashable, optional
            What tells the session's model from others, so that it is measured once.

        Raises
        ------
        DataError
            If it fails, or gives anything else.
        """
        values = self._values.get(model) if model is not None else None
        if values is None:
            values = self._measured(session)
            if model is not None:
                self._values[model] = values
        return values if values.ndim == 0 or self._part is None else self._half(values)

    def is_graded(self, session: Session) -> bool:
        """Whether samples may be right in part, or may lose less than all.

        A function that compares with the original gives 1 for every sample of it, whatever it would
        give for others. So it is asked once what it makes of the original with blurred outputs.
        """
        if self._graded is None:
            try:
                with foreign_call(), warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    values = np.asarray(self._function(_Blurred(session.raw)), dtype=np.float64)
            except KeyboardInterrupt:
                raise
            except BaseException:  # it asks for more than it was shown, or can't read such outputs
                values = np.zeros(0)
            self._graded = bool((np.isfinite(values) & ~np.isin(values, (0.0, 1.0))).any())
        return self._graded

    def _measured(self, session: Session) -> NDArray[np.float64]:
        """What it gives for all of its samples, or as one number."""
        try:
            with foreign_call():
                values = np.asarray(self._function(session.raw), dtype=np.float64)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # frameworks raise exceptions of their kinds
            raise DataError(
                f"the metric {self.name} failed: {type(error).__name__}: {one_line(error)}"
            ) from None
        if values.size == 1:
            values = values.reshape(())
        if values.ndim > 1 or not values.size:
            raise DataError(
                f"the metric {self.name} gave an array of shape {list(values.shape)}: it must give "
                "a number, or one for each sample"
            )
        self.samples = values.size if values.ndim else 0
        if np.isnan(values).any():
            raise DataError(f"the metric {self.name} gave nan: it must give a number")
        return values

    def _half(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        order = np.random.default_rng(_SPLIT).permutation(len(values))
        half = len(order) // 2
        return values[order[:half] if self._part == "choose" else order[half:]]


class _Blurred:
    """A session of ONNX Runtime whose outputs of numbers are noisy; all else is the session's."""

    def __init__(self, raw: Any) -> None:
        self._raw, self._rng = raw, np.random.default_rng(_SPLIT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def run(self, *arguments: Any, **named: Any) -> list[Any]:
        """What the session gives, with noise on it."""
        return [self._noisy(y) for y in self._raw.run(*arguments, **named)]

    def _noisy(self, y: Any) -> Any:
        if not isinstance(y, np.ndarray) or y.dtype.kind != "f":
            return y
        noise = self._rng.standard_normal(y.shape)
        return (y + _BLUR * np.nan_to_num(y.std()) * noise).astype(y.dtype)
