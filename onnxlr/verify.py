"""Judging a saved model beside the original: the user's metric, and numerical fidelity."""

import contextlib
import importlib
import math
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
from numpy.typing import NDArray

from onnxlr.data import Samples
from onnxlr.errors import DataError, ModelError, UsageError, one_line
from onnxlr.runtime import Feed, Machine, Session

Outputs = dict[str, NDArray[Any]]

_WHOLE = 1e-2  # within which probabilities of low precision add up to 1
_LEAST_PROBABILITY = 1e-7  # told apart
_ONE_METRIC = threading.RLock()  # the standard output and the current folder are the process's
METRICS = ("top1", "agreement", "rel-error", "cosine")
_REFERENCE_BUDGET = 256 << 20  # bytes of the original's outputs kept between judgements


@dataclass(frozen=True)
class Fidelity:
    """How close the outputs are to the original's, over all samples.

    Attributes
    ----------
    rel_error : float
        ‖y − ŷ‖ / ‖y − ȳ‖ of the output where it is largest, ȳ being the mean over the samples.
    cosine : float
        Cosine between y and ŷ, of the output where it is smallest.
    agreement : float or None
        Share of samples with the same arg-max; None where no output is one vector of classes.
    divergence : float or None
        Mean Kullback–Leibler divergence of the class probabilities from the original's, in nats;
        None as for agreement.
    """

    rel_error: float
    cosine: float
    agreement: float | None
    divergence: float | None = None


@dataclass(frozen=True)
class Quality:
    """The metric's value for the original and for a candidate, and the candidate's fidelity."""

    metric: str
    original: float
    optimized: float
    fidelity: Fidelity

    @property
    def drop(self) -> float:
        """What the candidate loses, in the metric's unit; infinite if it isn't a number."""
        worse = self.original - self.optimized
        worse = -worse if self.metric == "rel-error" else worse
        return worse if math.isfinite(worse) else math.inf


class Judge:
    """Runs candidates on fixed samples and compares them with the original.

    Parameters
    ----------
    original : Session
    samples : Samples or sequence of feeds
        The user's validation samples, or synthetic feeds.
    metric : str or None
        One of ``METRICS``, ``module:function``, or None for the default: ``top1`` with labels,
        else ``agreement`` for a single output of one class vector, else ``rel-error``.

    Raises
    ------
    UsageError
        If the metric is none of these or its function can't be imported.
    DataError
        If it needs labels or class scores that aren't there.
    """

    def __init__(
        self, original: Session, samples: Samples | Sequence[Feed], metric: str | None
    ) -> None:
        self._token = uuid.uuid4().hex
        self._original = original
        self._samples = samples
        self._metric_given = metric
        self._batch = _workable_batch(original, samples)
        self._kept: list[Outputs] | None = []
        self._spreads: dict[str, _Spread] = {}
        self.labels = samples.labels if isinstance(samples, Samples) else None
        self._measure_original()
        self._user = _user_metric(metric) if metric and ":" in metric else None
        self.metric = metric or self._default_metric()
        if self._user is None:
            self._check(self.metric)
        self._baseline: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as what it was made of; made there once."""
        return _judge, (self._token, self._original, self._samples, self._metric_given)

    @property
    def machine(self) -> Machine:
        """Where the original runs, and a candidate has to."""
        return self._original.machine

    @property
    def has_class_vector(self) -> bool:
        """Whether an output is one vector of class scores a sample."""
        return self._one_vector

    @property
    def sees_nothing(self) -> bool:
        """Whether the original's outputs are all NaN or infinite, as a ruined model's are."""
        return self._user is None and self._elements > 0 and not self._finite

    @property
    def default_is_blind(self) -> bool:
        """Whether what is judged by, where the user names no metric, says little here.

        On synthetic inputs, and where the original gives every sample the same class, even a
        ruined model may agree. Where the original gets no more labels right than chance would, a
        ruined one does as well.
        """
        if self.metric == "top1":
            return self._right * self._fewest <= self._judged
        return self.metric == "agreement" and (
            not isinstance(self._samples, Samples) or len(self._seen) < 2
        )

    def judge(self, candidate: Session) -> Quality:
        """Run a candidate on every sample."""
        totals = {name: _Totals() for name in self._spreads}
        agree = right = right_before = count = 0
        divergence = 0.0
        for i, batch in enumerate(self._batches()):
            before = self._reference(i, batch)
            after = _cut(candidate.run(batch.feed), batch)
            for name, total in totals.items():
                total.add(before[name], after.get(name))
            if self._classes is not None:
                original = before[self._classes].argmax(-1)
                guess = _guess(before[self._classes], after.get(self._classes))
                count += original.size
                agree += int(np.count_nonzero(guess == original))
                if self._one_vector:
                    divergence += self._divergence(before[self._classes], after[self._classes])
                if self.metric == "top1" and self.labels is not None:
                    right += int(np.count_nonzero(guess == self.labels[batch.index]))
                    right_before += int(np.count_nonzero(original == self.labels[batch.index]))
        shown = self._one_vector or self.metric == "agreement"
        fidelity = Fidelity(
            max(t.rel_error(self._spreads[n].norm2()) for n, t in totals.items()),
            min(t.cosine() for t in totals.values()),
            agree / count if count and shown else None,
            divergence / count if count and self._one_vector else None,
        )
        if self._user is not None:
            if self._baseline is None:
                self._baseline = self._call_user(self._original)
            return Quality(self.metric, self._baseline, self._call_user(candidate), fidelity)
        values = {
            "top1": (right_before / max(count, 1), right / max(count, 1)),
            "agreement": (1.0, agree / max(count, 1)),
            "rel-error": (0.0, fidelity.rel_error),
            "cosine": (1.0, fidelity.cosine),
        }
        return Quality(self.metric, *values[self.metric], fidelity)

    def _divergence(self, before: NDArray[Any], after: NDArray[Any]) -> float:
        """Σ p · log(p / q) over the samples."""
        if np.array_equal(before, after):
            return 0.0
        finite = bool(np.isfinite(before).all() and np.isfinite(after).all())
        if before.shape != after.shape or not finite:
            return math.inf
        p, q = (self._log_probabilities(y.astype(np.float64)) for y in (before, after))
        return max(0.0, float(np.sum(np.exp(p) * (p - q))))

    def _log_probabilities(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of outputs that are probabilities already, or of scores that a softmax makes some of."""
        if self._probable:
            scores = np.log(np.maximum(scores, _LEAST_PROBABILITY))
        found: NDArray[np.float64] = scipy.special.log_softmax(scores, axis=-1)
        return found

    def _default_metric(self) -> str:
        if self.labels is not None:
            return "top1"
        return "agreement" if self._one_vector and len(self._spreads) == 1 else "rel-error"

    def _check(self, metric: str) -> None:
        if metric not in METRICS:
            raise UsageError(
                f"--metric {metric!r} is unknown: choose from {', '.join(METRICS)} or "
                "module:function"
            )
        if metric == "top1" and self.labels is None:
            raise DataError("the metric top1 needs labels: name their array with --labels")
        if metric == "top1" and not self._one_vector:
            raise DataError("the metric top1 needs an output of shape (batch, classes)")
        if metric == "top1" and self.labels is not None and isinstance(self._samples, Samples):
            used = self.labels[self._samples.index]
            if used.min() < 0 or used.max() >= self._fewest:
                raise DataError(
                    f"the labels of {self._samples.label} run from {used.min()} to {used.max()}, "
                    f"the output {self._classes!r} has the classes 0 to {self._fewest - 1}: shift "
                    "the labels, or leave those samples out"
                )
        if metric == "agreement" and self._classes is None:
            raise DataError("the metric agreement needs an output with a last axis of classes")

    def _measure_original(self) -> None:
        held = self._finite = self._elements = 0
        self._classes: str | None = None
        self._one_vector = False
        self._probable = True  # as long as no sample's scores say otherwise
        self._seen: set[int] = set()
        self._fewest = sys.maxsize  # classes
        self._right = self._judged = 0
        for batch in self._batches():
            outputs = _cut(self._original.run(batch.feed), batch)
            if not self._spreads:
                names = [n for n, y in outputs.items() if _is_float(y)] or [
                    n for n, y in outputs.items() if y.dtype.kind in "biu"
                ]
                if not names:
                    raise ModelError(
                        f"{self._original.label} has no output that is a tensor of numbers, and so "
                        "nothing to judge: use --verify none"
                    )
                self._spreads = {name: _Spread() for name in names}
                classes = [n for n in names if _are_scores(outputs[n])]
                self._classes = classes[0] if classes else None
                self._one_vector = bool(classes)
            if self._classes is not None:
                scores = outputs[self._classes]
                if not _are_scores(scores):  # of boxes that were found, say, and here are none
                    self._classes, self._one_vector = None, False
                elif scores.ndim != 2 or (batch.index is not None and len(scores) != batch.samples):
                    self._one_vector = False
            if self._classes is not None:
                scores = outputs[self._classes]
                self._fewest = min(self._fewest, scores.shape[-1])
                guess = scores.argmax(-1)
                if len(self._seen) < 2:
                    self._seen.update(np.unique(guess).tolist())
                if self.labels is not None and self._one_vector:
                    self._right += int(np.count_nonzero(guess == self.labels[batch.index]))
                    self._judged += len(guess)
                scores = scores.astype(np.float64)
                with np.errstate(invalid="ignore", over="ignore"):  # infinities are no shares
                    whole = np.abs(scores.sum(-1) - 1.0).max(initial=0.0) < _WHOLE
                self._probable &= bool(whole and scores.min(initial=0.0) >= 0)
            for name, spread in self._spreads.items():
                spread.add(outputs[name], batch.samples)
                self._finite += int(np.count_nonzero(np.isfinite(outputs[name].astype(np.float64))))
                self._elements += outputs[name].size
            if self._kept is not None:
                held += sum(y.nbytes for y in outputs.values())
                self._kept.append(outputs)
                if held > _REFERENCE_BUDGET:
                    self._kept = None  # from now on the original runs beside each candidate

    def _reference(self, i: int, batch: "_Batch") -> Outputs:
        if self._kept is not None:
            return self._kept[i]
        return _cut(self._original.run(batch.feed), batch)

    def _batches(self) -> "Iterator[_Batch]":
        if isinstance(self._samples, Samples):
            for feed, index, padded in self._samples.batches(self._batch):
                yield _Batch(feed, len(index), padded, index)
        else:
            for feed in self._samples:
                rows = next((a.shape[0] for a in feed.values() if a.ndim), 1)
                yield _Batch(feed, rows, rows, None)

    def _call_user(self, session: Session) -> float:
        assert self._user is not None
        with _ONE_METRIC:
            here = Path.cwd()
            try:
                # What it prints is no part of ours, and where it goes is its own affair.
                with contextlib.redirect_stdout(sys.stderr):
                    value = float(self._user(session.raw))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # frameworks have ends of their own
                raise DataError(
                    f"the metric {self.metric} failed: {type(error).__name__}: {one_line(error)}"
                ) from None
            finally:
                os.chdir(here)
        if math.isnan(value):
            raise DataError(f"the metric {self.metric} gave nan: it must give a number")
        return value


_LATEST: dict[str, Judge] = {}  # the last that arrived in this process


def _judge(
    token: str, original: Session, samples: Samples | Sequence[Feed], metric: str | None
) -> Judge:
    if token not in _LATEST:
        _LATEST.clear()
        _LATEST[token] = Judge(original, samples, metric)
    return _LATEST[token]


@dataclass(frozen=True, eq=False)
class _Batch:
    """One run: what is fed, how many samples count, and how many rows it was padded to."""

    feed: Feed
    samples: int
    padded: int
    index: NDArray[np.intp] | None


def _workable_batch(session: Session, samples: Samples | Sequence[Feed]) -> int | None:
    """The batch a model takes; one where it declares an open batch that it doesn't keep."""
    if not isinstance(samples, Samples):
        return None
    try:
        session.run(next(iter(samples.batches()))[0])
    except ModelError:
        if samples.batch == 1 or any(s.fixed_batch is not None for s in samples.specs):
            raise
        return 1
    return samples.batch


def _cut(outputs: Outputs, batch: _Batch) -> Outputs:
    """Drop the rows that only pad a last batch."""
    if batch.padded == batch.samples:
        return outputs
    return {
        n: y[: batch.samples] if y.ndim and y.shape[0] == batch.padded else y
        for n, y in outputs.items()
    }


def _are_scores(output: NDArray[Any]) -> bool:
    return output.ndim >= 2 and output.shape[-1] > 1


def _guess(before: NDArray[Any], after: NDArray[Any] | None) -> NDArray[np.intp]:
    """The classes; none that there is where the output has another shape than the original's."""
    if after is None or after.shape != before.shape:
        return np.full(before.shape[:-1], -1, np.intp)
    found: NDArray[np.intp] = after.argmax(-1)
    return found


def _is_float(array: NDArray[Any]) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating)) or array.dtype.name == "bfloat16"


def _user_metric(text: str) -> Callable[[Any], float]:
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


class _Spread:
    """‖y − ȳ‖² of one output, in one pass: values are shifted by the first sample's."""

    def __init__(self) -> None:
        self._first: NDArray[np.float64] | None = None
        self._sum: NDArray[np.float64] | float = 0.0
        self._squares = 0.0
        self._rows = 0
        self._regular = True
        self._shift = self._all_sum = self._all_squares = self._plain = 0.0
        self._all_count = 0

    def add(self, output: NDArray[Any], samples: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self._add(output, samples)

    def _add(self, output: NDArray[Any], samples: int) -> None:
        y = np.nan_to_num(output.astype(np.float64), posinf=0.0, neginf=0.0)
        if y.ndim == 0 or len(y) != samples:
            y = y[None]  # one sample's output: its first axis, if any, counts something else
        if self._first is None and y.size:
            self._first = y[0].copy()
            self._shift = float(y.mean())
        if self._first is not None and y.shape[1:] == self._first.shape:
            centred = y - self._first
            self._sum = self._sum + centred.sum(axis=0)
            self._squares += float(np.vdot(centred, centred))
            self._rows += len(y)
        else:
            self._regular = False
        self._all_sum += float((y - self._shift).sum())
        self._all_squares += float(np.square(y - self._shift).sum())
        self._plain += float(np.square(y).sum())
        self._all_count += y.size

    def norm2(self) -> float:
        """Around the mean over samples; around the overall mean where outputs vary in shape or
        there is one sample; around zero where the output is constant.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self._norm2()

    def _norm2(self) -> float:
        noise = 1e-12 * max(self._plain, 1e-300)
        if self._regular and self._rows > 1:
            around = self._squares - float(np.sum(np.square(self._sum))) / self._rows
            if around > noise:
                return around
        overall = self._all_squares - self._all_sum * self._all_sum / max(1, self._all_count)
        return overall if overall > noise else self._plain


class _Totals:
    """Sums over the samples of one output of a candidate."""

    def __init__(self) -> None:
        self._error = self._dot = self._before = self._after = 0.0

    def add(self, before: NDArray[Any], after: NDArray[Any] | None) -> None:
        if after is None or after.shape != before.shape:
            self._error = math.inf
            return
        y, z = before.astype(np.float64), after.astype(np.float64)
        if not np.array_equal(np.isfinite(y), np.isfinite(z)):
            self._error = math.inf
            return
        y, z = np.nan_to_num(y, posinf=0.0, neginf=0.0), np.nan_to_num(z, posinf=0.0, neginf=0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            self._error += float(np.square(y - z).sum())
            self._dot += float((y * z).sum())
            self._before += float(np.square(y).sum())
            self._after += float(np.square(z).sum())

    def rel_error(self, norm2: float) -> float:
        if self._error == 0.0:
            return 0.0
        if not (math.isfinite(self._error) and 0 < norm2 < math.inf):
            return math.inf  # beyond 1e154 squares leave the range, and nothing is known
        return math.sqrt(self._error / norm2)

    def cosine(self) -> float:
        if not math.isfinite(self._error):
            return 0.0
        scale = math.sqrt(self._before) * math.sqrt(self._after)
        if not math.isfinite(scale):
            return 0.0
        if scale == 0.0:
            return 1.0 if self._before == self._after else 0.0
        return min(1.0, self._dot / scale)
