"""What an output of the original looks like on the samples, as far as that tells what it holds."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.special
from numpy.typing import NDArray

from onnxlr.verify.fidelity import are_labels

_SIGNIFICANT = 3.0  # standard deviations
_WHOLE = 1e-2  # within which probabilities of low precision add up to 1
_ALIKE = 1e-3  # relative difference of lengths that are meant to be the same
_TINY = 1e-30
_UNLIKELY = 0.05  # the probability below which so many right labels aren't luck
_POOR, _MANY_CLASSES = 3, 6  # times chance, which is much only among many classes


class Profile:
    """One output of the original, gathered batch by batch.

    A vector is what lies along the last axis: one a sample where there are two axes, one a
    position where there are three.

    Parameters
    ----------
    labels : array of int or None
        The right class of each of the samples.

    Attributes
    ----------
    axes : int or None
        Number of axes; None before the first batch.
    columns : int or None
        Length of the vectors; None where it varies, or there is no axis.
    by_sample, single : bool
        Whether the first axis counts the samples; whether there is one number a sample.
    integer, label : bool
        Whether it holds integers or truth values, and whether those are labels (``are_labels``).
    as_input : bool
        Whether it is as large as an input of real numbers.
    probable : bool
        Whether the vectors are probabilities, or logarithms of some.
    same_length : bool
        Whether all vectors have the same Euclidean length.
    positive : bool
        Whether no entry is negative.
    """

    def __init__(self, labels: NDArray[Any] | None) -> None:
        self.axes: int | None = None
        self.columns: int | None = None
        self.by_sample = self.single = True
        self.probable = self.same_length = self.positive = True
        self.integer, self.label, self.as_input = False, False, True
        self._labels = labels
        self._guessed: Counter[int] = Counter()
        self._labelled: Counter[int] = Counter()
        self._right = 0
        self._vectors = 0
        self._certainty = 0.0
        self._length: float | None = None
        self._directions: NDArray[np.float64] | float = 0.0

    def add(
        self,
        output: NDArray[Any],
        samples: int,
        index: NDArray[np.intp] | None,
        inputs: Sequence[NDArray[Any]],
    ) -> None:
        """One batch of so many samples; ``index`` says which of all they are."""
        columns = output.shape[-1] if output.ndim else None
        if self.axes is None:
            self.axes, self.columns = output.ndim, columns
            self.integer, self.label = output.dtype.kind in "biu", are_labels(output)
        if columns != self.columns or output.ndim != self.axes:
            self.columns = None
        self.by_sample &= output.ndim > 0 and len(output) == samples
        self.single &= output.size == samples
        self.as_input &= output.ndim > 1 and any(
            x.size == output.size and x.dtype.kind not in "biu" for x in inputs
        )
        if self.label and self.single:
            self._add_guesses(output.reshape(-1), index)
            return
        if self.columns is None or output.ndim not in (2, 3) or not output.size:
            return
        vectors = output.reshape(-1, output.shape[-1]).astype(np.float64)
        with np.errstate(all="ignore"):
            self._add_vectors(np.nan_to_num(vectors, posinf=0.0, neginf=0.0))
        if output.ndim == 2:
            self._add_guesses(output.argmax(-1), index)

    def _add_vectors(self, vectors: NDArray[np.float64]) -> None:
        self.positive &= bool(vectors.min() >= 0)
        shares = vectors if self.positive else np.exp(np.minimum(vectors, 1.0))
        self.probable &= bool(np.abs(shares.sum(-1) - 1).max() < _WHOLE)
        lengths = np.linalg.norm(vectors, axis=-1)
        self._length = self._length if self._length is not None else float(lengths[0])
        off = np.abs(lengths - self._length).max()
        self.same_length &= bool(off <= _ALIKE * self._length)
        directions = vectors / np.maximum(lengths, _TINY)[:, None]
        self._directions = self._directions + directions.sum(axis=0)
        top = vectors if self.positive and self.probable else scipy.special.softmax(vectors, -1)
        self._certainty += float(top.max(-1).sum())
        self._vectors += len(vectors)

    def _add_guesses(self, guesses: NDArray[np.intp], index: NDArray[np.intp] | None) -> None:
        self._guessed.update(guesses.tolist())
        if self._labels is not None and index is not None and len(index) == len(guesses):
            labels = self._labels[index]
            self._labelled.update(labels.tolist())
            self._right += int(np.count_nonzero(guesses == labels))

    @property
    def of_classes(self) -> int:
        """How many columns have the largest number of a sample."""
        return len(self._guessed)

    @property
    def certainty(self) -> float:
        """The largest of the softmax of each vector, in the mean: 0 by chance, 1 for certain."""
        if not self._vectors or not self.columns or self.columns < 2:
            return 0.0
        chance = 1 / self.columns
        return (self._certainty / self._vectors - chance) / (1 - chance)

    @property
    def apart(self) -> float:
        """One minus the mean cosine between the vectors and the mean of their directions."""
        if not self._vectors:
            return 0.0
        return 1 - float(np.linalg.norm(self._directions)) / self._vectors

    @property
    def has_labels_beyond(self) -> bool:
        """Whether a label is no column."""
        return any(not 0 <= label < (self.columns or 0) for label in self._labelled)

    @property
    def right_by_chance(self) -> bool:
        """Whether no more labels are right than a guess among all classes would get."""
        return self._right * (self.columns or 1) <= sum(self._labelled.values())

    @property
    def doubt(self) -> str | None:
        """Why labels and outputs seem not to belong together, in a sentence; None if they do."""
        count, classes = sum(self._labelled.values()), self.columns or 0
        if not count or classes < 2 or self.has_labels_beyond:
            return None
        if classes**-count >= _UNLIKELY:
            return None  # of so few samples all may be right by luck
        by_luck = float(scipy.special.bdtrc(self._right - 1, count, 1 / classes))
        poor = classes >= _MANY_CLASSES and self._right * classes < _POOR * count
        if by_luck < _UNLIKELY and not poor:
            return None
        return (
            f"the original gets {self._right / count:.0%} of {count:,} samples right, where chance "
            f"gets {1 / classes:.1%}: are the inputs prepared as in training (scale, order of the "
            "channels), and do the labels count the classes as the model does?"
        )

    @property
    def right_for_sure(self) -> bool:
        """Whether more labels are right than chance allows for columns that mean anything else.

        Guesses that know nothing of the labels meet them as often as both are frequent.
        """
        count = sum(self._labelled.values())
        expected = sum(n * self._labelled[c] for c, n in self._guessed.items()) / max(count, 1)
        return self._right - expected > _SIGNIFICANT * math.sqrt(max(expected, 1.0))
