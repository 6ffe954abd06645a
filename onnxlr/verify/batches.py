"""The batches that models are judged on: what is fed, and what of the outputs counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.errors import ModelError
from onnxlr.prepare.samples import Samples
from onnxlr.system.session import Feed, Session
from onnxlr.verify.fidelity import Outputs, outputs_of_numbers


@dataclass(frozen=True, eq=False)
class Batch:
    """One run: what is fed, how many samples count, and how many rows it was padded to."""

    feed: Feed
    samples: int
    padded: int
    index: NDArray[np.intp] | None

    def run(self, session: Session) -> Outputs:
        """A model's outputs, without the rows that only pad a last batch.

        Maps of one pixel, of shape (n, C, 1, 1) or (n, 1, 1, C), are the vectors that they hold.
        """
        outputs = session.run(self.feed)
        if self.padded != self.samples:
            outputs = {
                n: y[: self.samples] if y.ndim and y.shape[0] == self.padded else y
                for n, y in outputs.items()
            }
        return {n: self._as_vectors(y) for n, y in outputs.items()}

    def _as_vectors(self, y: NDArray[Any]) -> NDArray[Any]:
        if y.ndim < 4 or len(y) != self.samples or not y.size:
            return y
        size = y.size // self.samples
        one_pixel = size > 1 and size in (y.shape[1], y.shape[-1])
        return y.reshape(self.samples, size) if one_pixel else y


def batches_of(samples: Samples | Sequence[Feed], size: int | None) -> Iterator[Batch]:
    """The batches of samples, of this size, or the synthetic feeds as they are."""
    if isinstance(samples, Samples):
        for feed, index, padded in samples.batches(size):
            yield Batch(feed, len(index), padded, index)
    else:
        for feed in samples:
            rows = next((a.shape[0] for a in feed.values() if a.ndim), 1)
            yield Batch(feed, rows, rows, None)


def workable_batch(session: Session, samples: Samples | Sequence[Feed]) -> int | None:
    """The batch a model takes; one where it declares an open batch that it doesn't keep."""
    if not isinstance(samples, Samples):
        return None
    fixed = samples.batch == 1 or any(s.fixed_batch is not None for s in samples.specs)
    feed, index, _ = next(iter(samples.batches()))
    try:
        outputs = session.run(feed)
    except ModelError:
        if fixed:
            raise
        return 1
    by_sample = all(outputs[n].shape[:1] == (len(index),) for n in outputs_of_numbers(outputs))
    return samples.batch if fixed or by_sample else 1
