"""How far a candidate's outputs are from the original's: sums over the samples, batch by batch."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.special
from numpy.typing import NDArray

from onnxlr.verify.confidence import Losses

Outputs = dict[str, NDArray[Any]]

_WHOLE = 1e-2  # within which probabilities of low precision add up to 1
_LEAST_PROBABILITY = 1e-7  # told apart


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
    same_shapes : bool
        Whether every output has the original's shape. Where one hasn't, what only one of both has
        counts as an error.
    """

    rel_error: float
    cosine: float
    agreement: float | None
    divergence: float | None = None
    same_shapes: bool = True


@dataclass(frozen=True)
class Quality:
    """The metric's value for the original and for a candidate, and the candidate's fidelity.

    Attributes
    ----------
    metric : str
    original, optimized : float
    fidelity : Fidelity
    losses : tuple of Losses
        What each sample loses by the metric, of every output that counts; empty where the metric
        is one number for all of them.
    """

    metric: str
    original: float
    optimized: float
    fidelity: Fidelity
    losses: tuple[Losses, ...] = field(default=(), compare=False, repr=False)

    @property
    def drop(self) -> float:
        """What the candidate loses, in the metric's unit; infinite if it isn't a number.

        Numbers in other shapes can't be compared as the metrics do.
        """
        if not self.fidelity.same_shapes and self.metric in ("rel-error", "cosine"):
            return math.inf
        before, after = self.original, self.optimized
        worse = after - before if self.metric == "rel-error" else before - after
        return worse if math.isfinite(worse) else math.inf

    def beside(self, other: "Quality") -> "Quality":
        """The same, where the same model was seen to lose something on other samples too."""
        if len(self.losses) != len(other.losses):
            return self
        pairs = zip(self.losses, other.losses, strict=True)
        return replace(self, losses=tuple(mine.beside(theirs) for mine, theirs in pairs))


class Classes:
    """The output of class scores, if there is one; or labels, where no output holds real numbers.

    Parameters
    ----------
    names : sequence of str
        Outputs of numbers.

    Attributes
    ----------
    output : str or None
        The first whose last axis has more than one entry, in every batch; None for labels.
    labels : tuple of str
        The outputs, if all of them hold labels: integers of 32 bits and more, or truth values.
    one_vector : bool
        Whether it is one vector a sample.
    one_label : bool
        Whether the only output holds one label a sample.
    fewest : int
        Classes it has, of all batches the fewest.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.output: str | None = None
        self.labels: tuple[str, ...] = ()
        self.one_vector = self.one_label = False
        self.fewest = sys.maxsize
        self._names = names
        self._begun = False
        self._probable = True  # as long as no sample's scores say otherwise

    @property
    def answered(self) -> bool:
        """Whether outputs answer with a class: by its label, or by the largest of scores."""
        return self.output is not None or bool(self.labels)

    @property
    def one_answer(self) -> bool:
        """Whether there is one answer a sample."""
        return self.one_vector or self.one_label

    def add(self, outputs: Outputs, samples: int, index: NDArray[np.intp] | None) -> None:
        """One batch of the original's outputs; ``index`` says which of the samples they are."""
        if not self._begun:
            self._begun = True
            if self._names and all(are_labels(outputs[n]) for n in self._names):
                self.labels = tuple(self._names)
                self.one_label = len(self.labels) == 1
            else:
                self.output = next((n for n in self._names if _are_scores(outputs[n])), None)
            self.one_vector = self.output is not None
        if self.one_label:
            self.one_label = outputs[self.labels[0]].size == samples
        if self.output is None:
            return
        scores = outputs[self.output]
        if not _are_scores(scores):  # of boxes, say, of which there are none here
            self.output, self.one_vector = None, False
            return
        if scores.ndim != 2 or (index is not None and len(scores) != samples):
            self.one_vector = False
        self.fewest = min(self.fewest, scores.shape[-1])
        scores = scores.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # infinities are no shares
            whole = np.abs(scores.sum(-1) - 1.0).max(initial=0.0) < _WHOLE
        self._probable &= bool(whole and scores.min(initial=0.0) >= 0)

    def answers(self, outputs: Outputs) -> list[NDArray[Any] | None]:
        """The class of each vector, or the labels of each output; None for what isn't there."""
        if self.output is None:
            return [outputs.get(name) for name in self.labels]
        scores = outputs.get(self.output)
        return [None if scores is None or not scores.ndim else scores.argmax(-1)]

    def changed(self, before: Outputs, after: Outputs) -> list[NDArray[np.bool_]]:
        """Which answers are others; answers that only one of both has are."""
        pairs = zip(self.answers(before), self.answers(after), strict=True)
        if self.output is not None:  # where there are other classes, none is the same
            scores = after.get(self.output)
            if scores is None or before[self.output].shape[-1:] != scores.shape[-1:]:
                return [np.ones(a.shape, np.bool_) for a, _ in pairs if a is not None]
        return [_differ(a, b) for a, b in pairs if a is not None]

    def divergence(self, before: NDArray[Any], after: NDArray[Any]) -> float:
        """Σ p · log(p / q) over the samples."""
        if np.array_equal(before, after):
            return 0.0
        finite = bool(np.isfinite(before).all() and np.isfinite(after).all())
        if before.shape != after.shape or not finite:
            return math.inf
        p, q = (self._log_probabilities(y.astype(np.float64)) for y in (before, after))
        return max(0.0, float(np.sum(np.exp(p) * (p - q))))

    def _log_probabilities(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logarithms of the outputs where they are probabilities, else of their softmax."""
        if self._probable:
            scores = np.log(np.maximum(scores, _LEAST_PROBABILITY))
        logarithms: NDArray[np.float64] = scipy.special.log_softmax(scores, axis=-1)
        return logarithms


def _differ(before: NDArray[Any], after: NDArray[Any] | None) -> NDArray[np.bool_]:
    if after is None or before.shape != after.shape:
        before, after = _padded(before, after)
    return np.asarray(before != after)


def _padded(
    before: NDArray[Any], after: NDArray[Any] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two outputs made as large as both together, with NaN where there is nothing."""
    after = np.zeros((0,) * before.ndim) if after is None else after
    if before.ndim != after.ndim:
        before, after = before.reshape(-1), after.reshape(-1)
    shape = tuple(map(max, before.shape, after.shape))
    arrays = []
    for array in (before, after):
        arrays.append(np.full(shape, np.nan))
        arrays[-1][tuple(map(slice, array.shape))] = array
    return arrays[0], arrays[1]


def as_finite(output: NDArray[Any]) -> NDArray[np.float64]:
    """An output in double precision, with 0 where it is NaN or infinite."""
    finite: NDArray[np.float64] = np.nan_to_num(output.astype(np.float64), posinf=0.0, neginf=0.0)
    return finite


def outputs_of_numbers(outputs: Outputs) -> list[str]:
    """Names of the real outputs; of those of integers and truth values where there are none."""
    return [n for n, y in outputs.items() if _is_float(y)] or [
        n for n, y in outputs.items() if y.dtype.kind in "biu"
    ]


def _are_scores(output: NDArray[Any]) -> bool:
    return output.ndim >= 2 and output.shape[-1] > 1


def are_labels(output: NDArray[Any]) -> bool:
    """Whether an output holds truth values or integers that are no bytes, as of images."""
    return output.dtype.kind == "b" or (output.dtype.kind in "iu" and output.dtype.itemsize > 2)


def _is_float(array: NDArray[Any]) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating)) or array.dtype.name == "bfloat16"


class Spread:
    """‖y − ȳ‖² of one output, in one pass: values are shifted by the first sample's.

    Attributes
    ----------
    size, finite : int
        Elements seen, and those that are numbers.
    """

    def __init__(self) -> None:
        self.size = self.finite = 0
        self._first: NDArray[np.float64] | None = None
        self._sum: NDArray[np.float64] | float = 0.0
        self._squares = 0.0
        self._rows = 0
        self._regular = True
        self._shift = self._all_sum = self._all_squares = self._plain = 0.0

    def add(self, output: NDArray[Any], samples: int) -> None:
        """One batch of the original's output, with so many samples."""
        with np.errstate(over="ignore", invalid="ignore"):
            self._add(output, samples)

    def _add(self, output: NDArray[Any], samples: int) -> None:
        y = output.astype(np.float64)
        self.size += y.size
        self.finite += int(np.count_nonzero(np.isfinite(y)))
        y = as_finite(y)
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
        overall = self._all_squares - self._all_sum * self._all_sum / max(1, self.size)
        return overall if overall > noise else self._plain


class Totals:
    """Sums over the samples of one output of a candidate."""

    def __init__(self) -> None:
        self.same_shape = True
        self._error = self._dot = self._before = self._after = 0.0

    def add(self, before: NDArray[Any], after: NDArray[Any] | None) -> None:
        """One batch of the original's output and of the candidate's."""
        if after is None or after.shape != before.shape:
            self.same_shape = False
            before, after = map(as_finite, _padded(before, after))
        y, z = before.astype(np.float64), after.astype(np.float64)
        if not np.array_equal(np.isfinite(y), np.isfinite(z)):
            self._error = math.inf
            return
        y, z = as_finite(y), as_finite(z)
        with np.errstate(over="ignore", invalid="ignore"):
            self._error += float(np.square(y - z).sum())
            self._dot += float((y * z).sum())
            self._before += float(np.square(y).sum())
            self._after += float(np.square(z).sum())

    def rel_error(self, norm2: float) -> float:
        """See ``Fidelity``; ``norm2`` is the output's spread."""
        if self._error == 0.0:
            return 0.0
        if not (math.isfinite(self._error) and 0 < norm2 < math.inf):
            return math.inf  # beyond 1e154 squares leave the range of doubles
        return math.sqrt(self._error / norm2)

    def cosine(self) -> float:
        """See ``Fidelity``."""
        if not math.isfinite(self._error):
            return 0.0
        scale = math.sqrt(self._before) * math.sqrt(self._after)
        if not math.isfinite(scale):
            return 0.0
        if scale == 0.0:
            return 1.0 if self._before == self._after else 0.0
        return min(1.0, self._dot / scale)
