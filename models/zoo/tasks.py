"""Metrics of the tasks of the zoo's models: a number for each sample, 1 at best.

onnxlr calls these functions as ``--metric models.zoo.tasks:NAME``; ``set_task`` says before
on which samples. They compare to the truth where there is one, else to the original model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import scipy.ndimage
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]
Box = tuple[float, float, float, float]  # left, top, right, bottom

_BATCH = 16
_INK, _SHRUNK = 0.3, 1.5  # detector: the score from which a pixel is text, how boxes are widened
_OVERLAP = 0.5  # intersection over union from which a box counts as the same
_NOTE = 0.3
_CENTS, _BIN = 50.0, 20.0


@dataclass
class _Task:
    """The samples of one model, the truth about them, and what the original makes of them."""

    original: Path
    samples: Arrays
    truth: Arrays
    expected: dict[str, Any] = field(default_factory=dict)

    def reference(self, name: str, make: Callable[[ort.InferenceSession], Any]) -> Any:
        """Return what ``make`` gets from the original; it is called once for each name."""
        if name not in self.expected:
            session = ort.InferenceSession(self.original, providers=["CPUExecutionProvider"])
            self.expected[name] = make(session)
        return self.expected[name]


_tasks: list[_Task] = []


def set_task(original: Path, samples: Path, truth: Path) -> None:
    """Set the samples that the metrics are measured on.

    Parameters
    ----------
    original : Path
    samples : Path
        ``.npz`` of the model's inputs.
    truth : Path
        ``.npz`` of the truth about those samples.
    """
    with np.load(samples) as inputs, np.load(truth) as expected:
        _tasks[:] = [_Task(original, dict(inputs), dict(expected))]


def _outputs(session: ort.InferenceSession, samples: Arrays) -> list[NDArray[Any]]:
    """Return all outputs for all samples, in batches if the model leaves their size open."""
    count = len(next(iter(samples.values())))
    shape = session.get_inputs()[0].shape
    size = 1 if isinstance(shape[0], int) else _BATCH
    parts = [
        session.run(None, {name: a[i : i + size] for name, a in samples.items()})
        for i in range(0, count, size)
    ]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def recogniser(session: ort.InferenceSession) -> Floats:
    """Return the share of characters read right in each line: 1 − edit distance / length."""
    (task,) = _tasks
    characters = session.get_modelmeta().custom_metadata_map.get("character")
    if characters is None:  # a candidate keeps the metadata, a session from bytes has them too
        raise ValueError("the model doesn't say what its characters are")
    letters = ["", *characters.splitlines(), " "]
    (scores,) = _outputs(session, task.samples)
    shares = []
    for best, text in zip(scores.argmax(-1), map(str, task.truth["text"]), strict=True):
        once = best[np.flatnonzero(np.diff(best, prepend=-1))]
        wrong = min(_distance("".join(letters[i] for i in once), text), len(text))
        shares.append(1 - wrong / len(text))
    return np.array(shares)


def _distance(one: str, other: str) -> int:
    """Return the Levenshtein distance of two words.

    >>> _distance("kitten", "sitting"), _distance("", "abc")
    (3, 3)
    """
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above = row
        row = [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def detector(session: ort.InferenceSession) -> Floats:
    """Return the F-measure of the detected lines of each page against those that were drawn."""
    (task,) = _tasks
    (maps,) = _outputs(session, task.samples)
    measures = []
    for page, truth in zip(maps[:, 0], task.truth["boxes"], strict=True):
        left = [_box(b) for b in truth if b[2] > 0]
        drawn, detected, right = len(left), 0, 0
        for box in _text_boxes(page):
            detected += 1
            best = max(left, key=lambda b: _overlap(b, box), default=None)
            if best is not None and _overlap(best, box) >= _OVERLAP:
                left.remove(best)
                right += 1
        measures.append(2 * right / max(detected + drawn, 1))
    return np.array(measures)


def _box(row: NDArray[Any]) -> Box:
    left, top, right, bottom = map(float, row)
    return left, top, right, bottom


def _text_boxes(page: NDArray[Any]) -> Iterator[Box]:
    """Yield boxes around ink, widened as differentiable binarization shrank them (Liao et al.)."""
    labels, _ = scipy.ndimage.label(page > _INK)
    for rows, columns in scipy.ndimage.find_objects(labels):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) < 3:
            continue
        reach = _SHRUNK * height * width / (2 * (height + width))
        yield (
            columns.start - reach,
            rows.start - reach,
            columns.stop + reach,
            rows.stop + reach,
        )


def _overlap(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes.

    >>> _overlap((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return common / (sum(areas) - common)


def opinion_scores(session: ort.InferenceSession) -> Floats:
    """Return 1 − the difference from the original's scores, as a part of their scale of 4."""
    (task,) = _tasks
    before = task.reference("scores", lambda s: _outputs(s, task.samples)[0])
    (after,) = _outputs(session, task.samples)
    return np.asarray(1 - np.abs(after - before).mean(axis=1) / 4, dtype=np.float64)


def speech(session: ort.InferenceSession) -> Floats:
    """Return for each frame of a stream whether both models say speech, or both say none."""
    (task,) = _tasks

    def stream(session: ort.InferenceSession) -> NDArray[Any]:
        state = np.zeros((2, 1, 128), np.float32)
        said = []
        for frame in task.truth["stream"]:
            feed = {"input": frame[None], "state": state, "sr": np.array(16_000, np.int64)}
            score, state = session.run(None, feed)
            said.append(float(score.squeeze()) >= 0.5)
        return np.array(said)

    return np.asarray(stream(session) == task.reference("stream", stream), dtype=np.float64)


def notes(session: ort.InferenceSession) -> Floats:
    """Return the F-measure of sounding notes in each window, against the original's."""
    (task,) = _tasks
    which = [i for i, out in enumerate(session.get_outputs()) if out.shape[-1] == 88]

    def sounding(session: ort.InferenceSession) -> NDArray[Any]:
        outputs = _outputs(session, task.samples)
        return np.stack([outputs[i] >= _NOTE for i in which], axis=1)  # (windows, outputs, …)

    before, after = task.reference("notes", sounding), sounding(session)
    both, each = _counts(before & after), _counts(before) + _counts(after)
    return np.where(each, 2 * both / np.maximum(each, 1), 1.0)


def _counts(windows: NDArray[Any]) -> Floats:
    """Return how much of each window is true."""
    return np.asarray(windows.reshape(len(windows), -1).sum(axis=1), dtype=np.float64)


def pitch(session: ort.InferenceSession) -> Floats:
    """Return for each frame whether its pitch is within 50 cents of the original's."""
    (task,) = _tasks

    def cents(session: ort.InferenceSession) -> NDArray[Any]:
        (scores,) = _outputs(session, task.samples)
        return np.asarray(scores.argmax(-1) * _BIN)

    before = task.reference("pitch", cents)
    return np.asarray(np.abs(cents(session) - before) <= _CENTS, dtype=np.float64)
