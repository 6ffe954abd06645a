"""Metrics: the names that are built in, their values and what each sample loses by them."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from onnxlr.verify.confidence import Array, Kind, Losses
from onnxlr.verify.fidelity import Classes, Fidelity, Outputs, Spread, as_finite

METRICS = ("top1", "agreement", "rel-error", "cosine")

_MOST = {"agreement": 1.0, "cosine": 2.0}  # that a sample can lose, where that has an end
_LARGEST = 1e100  # error that a sample counts as, so that means and deviations stay finite
_SHUFFLE = 0  # seed of the order of samples, which the tests of their mean need to be random


class Tally:
    """A built-in metric on the samples so far, and what each of them loses.

    A new metric gets its name in ``METRICS``, what a sample loses in ``_add``, its values in
    ``values``, and in ``Quality.drop`` the direction in which it is better.

    Parameters
    ----------
    metric : str
    classes : Classes
        The output of class scores or the labels, for ``top1`` and ``agreement``.
    labels : array of int or None
        The right classes, for ``top1``.
    spreads : mapping of str to Spread
        Of each output of numbers.
    samples : int
        How many there are in all.
    """

    def __init__(
        self,
        metric: str,
        classes: Classes,
        labels: NDArray[np.int64] | None,
        spreads: Mapping[str, Spread],
        samples: int,
    ) -> None:
        self._metric, self._classes, self._labels = metric, classes, labels
        by_classes = metric in ("top1", "agreement")
        self._values: dict[str, list[Array]] = {n: [] for n in ([""] if by_classes else spreads)}
        self._scales = {n: spread.norm2() / max(samples, 1) for n, spread in spreads.items()}
        self._apart = True  # as long as every output has its samples along the first axis
        self._right = self._right_before = self._agree = self._vectors = 0

    def add(
        self, before: Outputs, after: Outputs, samples: int, index: NDArray[np.intp] | None
    ) -> None:
        """One batch of outputs by the original and the candidate; ``index`` says which it is."""
        if "" in self._values:
            self._add_classes(before, after, samples, index)
            return
        for name, values in self._values.items():
            old, new = _rows(before[name], samples), _rows(after.get(name), samples)
            if old is None or new is None or old.shape != new.shape:
                self._apart = False
            elif self._metric == "cosine":
                values.append(1 - _cosines(old, new))
            elif self._scales[name] > 0:
                with np.errstate(over="ignore", invalid="ignore"):
                    errors = np.square(old - new).sum(axis=1) / self._scales[name]
                values.append(np.fmin(errors, _LARGEST))  # what is no number too
            else:
                self._apart = False

    def _add_classes(
        self, before: Outputs, after: Outputs, samples: int, index: NDArray[np.intp] | None
    ) -> None:
        classes = self._classes
        if self._metric == "agreement":
            changed = classes.changed(before, after)
            self._vectors += sum(c.size for c in changed)
            self._agree += sum(int(np.count_nonzero(~c)) for c in changed)
            rows = [_rows(c, samples) for c in changed]
            means = [r.mean(axis=1) if r.size else np.zeros(samples) for r in rows if r is not None]
            self._apart &= len(means) == len(changed)
            if self._apart:
                self._values[""].append(np.mean(means, axis=0))
            return
        assert self._labels is not None
        labels = self._labels[index]
        (original,), (guess,) = (classes.answers(y) for y in (before, after))
        assert original is not None
        right_before = original.reshape(labels.shape) == labels
        right = np.zeros(labels.shape, np.bool_)
        if guess is not None and guess.shape == original.shape:
            right = guess.reshape(labels.shape) == labels
        self._vectors += labels.size
        self._right_before += int(np.count_nonzero(right_before))
        self._right += int(np.count_nonzero(right))
        self._values[""].append(right_before.astype(np.float64) - right)

    def values(self, fidelity: Fidelity) -> tuple[float, float]:
        """The metric of the original and of the candidate."""
        vectors = max(self._vectors, 1)
        if self._metric == "top1":
            return self._right_before / vectors, self._right / vectors
        if self._metric == "agreement":
            return 1.0, self._agree / vectors if self._vectors else 1.0
        if self._metric == "rel-error":
            return 0.0, fidelity.rel_error
        losses = self.losses()
        return 1.0, 1 - max(item.mean for item in losses) if losses else fidelity.cosine

    def losses(self) -> tuple[Losses, ...]:
        """What each sample loses, of every output; empty where samples can't be told apart."""
        if not self._apart:
            return ()
        kind: Kind = "errors"
        if self._metric == "top1":
            kind = "pairs"
        elif self._metric == "agreement" and self._classes.one_answer:
            kind = "shares"
        power = 2 if self._metric == "rel-error" else 1
        most = _MOST.get(self._metric, math.inf)
        return tuple(
            Losses(kind, in_random_order(np.concatenate(values)), power, most=most)
            for values in self._values.values()
            if values
        )


def in_random_order(values: Array) -> Array:
    """The same values in an order that has nothing to do with what they are."""
    return values[np.random.default_rng(_SHUFFLE).permutation(len(values))]


def _rows(output: NDArray[np.generic] | None, samples: int) -> Array | None:
    """A row for each sample; None where they don't lie along the first axis."""
    if output is None:
        return None
    if samples == 1:
        return as_finite(output).reshape(1, -1)
    if output.ndim == 0 or len(output) != samples:
        return None
    return as_finite(output).reshape(samples, -1)


@np.errstate(invalid="ignore", over="ignore")
def _cosines(before: Array, after: Array) -> Array:
    """Cosine of each pair of rows: 1 for two rows of zeros, 0 for one."""
    dots = (before * after).sum(axis=1)
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    equal = (before == after).all(axis=1)
    cosines = np.where(norms > 0, dots / np.where(norms > 0, norms, 1.0), 0.0)
    return np.where(equal, 1.0, np.clip(np.nan_to_num(cosines), -1.0, 1.0))


def changes(before: Array, after: Array, scale: float, seen: float = 0.0) -> Losses:
    """What each sample loses by a metric of the user's that gives a number for each.

    Parameters
    ----------
    before, after : ndarray of shape (n,)
        Of the original and of the candidate; higher is better.
    scale : float
        What a sample may lose at most; differences count as if they were no larger.
    seen : float
        As ``Losses`` takes it.
    """
    lost = np.clip((before - after) / scale, -1.0, 1.0)
    whole = bool(np.isin(lost, (-1.0, 0.0, 1.0)).all())
    kind: Kind = "pairs" if whole else "differences"
    return Losses(kind, in_random_order(lost), scale=scale, seen=seen)
