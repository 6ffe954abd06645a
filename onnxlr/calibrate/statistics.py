"""Statistics of a layer's inputs: mean and covariance, by running sums over sampled rows."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.sampling import doubled, is_finite, sample_rows
from onnxlr.layers.kernel import matrix_sides
from onnxlr.layers.layer import Layer, Use
from onnxlr.types import Array

Rows = NDArray[np.float32]

NO_COVARIANCE: Array = np.zeros((0, 0, 0))  # of inputs that have a sample
WIDEST = 4608  # elements of an input, beyond which a covariance costs more than it gains
_ROWS = 48  # rows of inputs that are sampled for each element of a row
_MOST_ROWS = 65536
_BLOCK = 2048  # rows that are multiplied at once
_SINGLE = (1e-12, 1e12)  # largest values whose squares and their sums single precision holds


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of a layer's inputs for each of its g groups.

    Attributes
    ----------
    mean : ndarray of shape (g, n)
        For a convolution a row of inputs is a patch of n = S/g · kh · kw elements.
    covariance : ndarray of shape (g, n, n)
        Empty where it would be too large: then there is a sample.
    rows : int
        How many rows of inputs they come from.
    metric : ndarray of shape (g, m, m) or None
        What errors of the outputs are multiplied by before they are measured: the symmetric root of
        their influence on the outputs of later layers. None measures them as they are.
    sample : ndarray of shape (g, N, n) or None
        Rows of inputs in single precision; about their mean, once all are there.
    outputs : Statistics or None
        Beside a sample, moments of the layer's outputs, of many more rows: all that a closed form
        needs. None where outputs aren't the product of the weight alone, or too many.
    lookups : ndarray of shape (n,) or None
        How often each entry of a table is looked up: of a Gather that is all there is.
    """

    mean: Array
    covariance: Array
    rows: int
    metric: Array | None = None
    sample: Rows | None = None
    outputs: "Statistics | None" = None
    lookups: NDArray[np.int64] | None = None


# Of a layer that has no such reason, and no statistics either.
UNSEEN = "fitted to the weight: its inputs were empty, or can't be read out of the body it is in"


def weight_only_reason(layer: Layer) -> str | None:
    """Why a layer's factors are fitted to its weight alone; None if its inputs have statistics."""
    if layer.kind not in ("matrix", "conv", "conv-transpose", "gather", "projection"):
        return f"fitted to the weight: inputs of {layer.op} are not looked at"
    if layer.kind == "gather":
        if len({layer.lookup_axis(use) for use in layer.uses}) > 1:
            return "fitted to the weight: the nodes that use it look up along different axes"
    elif len({use.contracts_last for use in layer.uses}) > 1:
        return "fitted to the weight: the nodes that use it multiply it from both sides"
    if any(use.slot == 0 and use.x_axes in (None, 1) for use in layer.uses if use.inner):
        return "fitted to the weight: in a body it multiplies from the left what may be a vector"
    return None


def is_wide(layer: Layer) -> bool:
    """Whether covariances of a layer's inputs would cost more than they gain: rows serve."""
    groups, _, n = matrix_sides(layer)
    return layer.kind != "gather" and groups * n**2 > WIDEST**2


def merge_statistics(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of two sets of rows as one set (Chan, Golub & LeVeque 1983)."""
    rows = a.rows + b.rows
    share = b.rows / rows
    distance = b.mean - a.mean
    mean = a.mean + share * distance
    if a.lookups is not None and b.lookups is not None:
        return Statistics(mean, a.covariance, rows, lookups=a.lookups + b.lookups)
    if a.sample is not None and b.sample is not None:
        outputs = None
        if a.outputs is not None and b.outputs is not None:
            outputs = merge_statistics(a.outputs, b.outputs)
        sample = np.concatenate([a.sample, b.sample], axis=1)
        return Statistics(mean, a.covariance, rows, sample=sample, outputs=outputs)
    covariance = (1 - share) * a.covariance + share * b.covariance
    covariance += share * (1 - share) * distance[:, :, None] * distance[:, None, :]
    return Statistics(mean, covariance, rows)


class RunningSums:
    """Running sums of rows in double precision, about the mean of the first of them.

    Parameters
    ----------
    groups, size : int
        A row has so many elements in each group.
    paired : bool
        Whether rows of another model at the same places come with them.
    helper : Executor, optional
        A thread in which rows are summed while the caller gets the next ones ready.

    Attributes
    ----------
    rows : int
        How many rows are in the sums.
    row_target : int
        How many rows all runs together are to sample; it may be somewhat more.
    """

    def __init__(
        self, groups: int, size: int, *, paired: bool = False, helper: Executor | None = None
    ) -> None:
        self.rows = 0
        self.row_target = min(_MOST_ROWS, _ROWS * size)
        self._pending: list[tuple[Array, Array | None]] = []
        self._helper = helper
        self._summing: Future[None] | None = None
        self._shift: Array | None = None
        self._first = np.zeros((groups, size))
        self._second = np.zeros((groups, size, size))
        self._other_shift: Array | None = None
        self._other = np.zeros((groups, size) if paired else 0)
        self._cross = np.zeros((groups, size, size) if paired else 0)

    def share(self, runs: int) -> int:
        """How many rows one of so many runs is to sample."""
        return max(16, -(-self.row_target // max(1, runs)))

    def collect(self, rows: Array, others: Array | None) -> None:
        """Keep rows until there are enough: products of a few cost as much as of many."""
        self.rows += rows.shape[1]
        self._pending.append((rows, others))
        if sum(rows.shape[1] for rows, _ in self._pending) >= _BLOCK:
            self._sum_pending()

    def _sum_pending(self) -> None:
        """Have the rows that wait added to the sums, once those before them are."""
        self._wait()
        pending, self._pending = self._pending, []
        if self._helper is None:
            self._sum(pending)
        else:
            self._summing = self._helper.submit(self._sum, pending)

    def _sum_all(self) -> None:
        """Have all rows in the sums."""
        self._sum_pending()
        self._wait()

    def _wait(self) -> None:
        """Wait until nothing is being summed."""
        if self._summing is not None:
            self._summing.result()
            self._summing = None

    def _sum(self, pending: Sequence[tuple[Array, Array | None]]) -> None:
        """Add rows to the sums."""
        if not pending:
            return
        rows = np.concatenate([rows for rows, _ in pending], axis=1)
        paired = [others for _, others in pending if others is not None]
        if self._shift is None:
            self._shift = rows.mean(axis=1, keepdims=True)
        rows -= self._shift
        self._first += rows.sum(axis=1)
        if not paired:
            self._second += rows.transpose(0, 2, 1) @ rows
        else:
            others = np.concatenate(paired, axis=1)
            if self._other_shift is None:
                self._other_shift = others.mean(axis=1, keepdims=True)
            others -= self._other_shift
            self._other += others.sum(axis=1)
            self._second += _single_products(rows, rows)
            self._cross += _single_products(others, rows)

    def statistics(self) -> Statistics:
        """The moments of all rows so far."""
        self._sum_all()
        assert self._shift is not None
        offset = self._first / self.rows
        covariance = self._second / self.rows - offset[:, :, None] * offset[:, None, :]
        return Statistics(self._shift[:, 0] + offset, covariance, self.rows)

    def cross_moments(self) -> tuple[Array, Array]:
        """Mean (g, n) of the other model's inputs, and their covariance (g, n, n) with these."""
        self._sum_all()
        assert self._other_shift is not None
        first, second = self._other / self.rows, self._first / self.rows
        cross = self._cross / self.rows - first[:, :, None] * second[:, None, :]
        return self._other_shift[:, 0] + first, cross


def _single_products(a: Array, b: Array) -> Array:
    """Sums of products of the elements of rows, (g, n, n), for rows (g, rows, n) about their mean.

    They are summed in single precision, as most rows came, in half the time. The error is some
    1e-6 of the deviations of both: of no account beside the ridge of a regression, while moments
    without one could lose that they are positive.
    """
    largest = [float(np.abs(rows).max(initial=0.0)) for rows in (a, b)]
    if not all(_SINGLE[0] < value < _SINGLE[1] for value in largest):
        return np.asarray(a.transpose(0, 2, 1) @ b)
    left = a.astype(np.float32)
    right = left if b is a else b.astype(np.float32)
    return (left.transpose(0, 2, 1) @ right).astype(np.float64)


class RunningMoments(RunningSums):
    """Running sums of a layer's inputs.

    Parameters
    ----------
    layer : Layer
    feeds : int
        How many runs of the model there will be, among which the rows are shared out.
    seed : int
        Seed of the positions that are sampled.
    paired : bool
        Whether another model's inputs at the same places come with them (``add_pair``).
    helper : Executor, optional
        A thread in which rows are summed while the caller gets the next ones ready.

    Attributes
    ----------
    shapes_differ : bool
        Whether two models once gave the layer inputs of different shapes.
    """

    def __init__(
        self,
        layer: Layer,
        feeds: int,
        seed: int,
        *,
        paired: bool = False,
        helper: Executor | None = None,
    ) -> None:
        groups, _, n = matrix_sides(layer)
        super().__init__(groups, n, paired=paired, helper=helper)
        self.shapes_differ = False
        self._layer = layer
        self._share = self.share(feeds * len(layer.uses))  # of one batch, of one user
        self._rng = np.random.default_rng(seed)

    def add(self, use: Use, x: NDArray[np.generic]) -> None:
        """Add rows of the inputs of one run, evenly sampled."""
        if not x.size:  # a detector, say, that detects nothing: the layer has no inputs
            return
        rows = doubled(sample_rows(self._layer, use, x, self._share, self._rng))
        if is_finite(rows):
            self.collect(rows, None)

    def add_pair(
        self, use: Use, x: NDArray[np.generic], other: NDArray[np.generic]
    ) -> tuple[Array, Array] | None:
        """Add rows of inputs beside those of another model at the same places.

        Returns
        -------
        rows, others : ndarray of shape (g, rows, n)
            The rows that were added; None where the two don't belong together or aren't finite.
        """
        if x.shape != other.shape:  # the models chose by values, which differ
            self.shapes_differ = True
        if self.shapes_differ or not x.size:
            return None
        seed = int(self._rng.integers(2**63))
        rows, others = (
            doubled(sample_rows(self._layer, use, a, self._share, np.random.default_rng(seed)))
            for a in (x, other)
        )
        # Both or neither: one count of rows serves the moments of both.
        if not (is_finite(rows) and is_finite(others)):
            return None
        self.collect(rows, others)
        return rows, others
