"""Samples in memory: arrays by name, one array, or the batches of a loader."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.errors import DataError

Batch = Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]]

LABEL = "the data"  # in messages, as files are called by their path


@dataclass(frozen=True, eq=False)
class InMemory:
    """Samples that were handed over as arrays.

    Attributes
    ----------
    batches : tuple
        Of arrays with the samples along the first axis: by name, or in the order of the model's
        inputs, after which labels may come.
    """

    batches: tuple[Batch, ...]

    def __str__(self) -> str:
        return LABEL

    def arrays(self, inputs: Sequence[str], labels: str | None) -> list[dict[str, NDArray[Any]]]:
        """Arrays by name, of batches whose samples have one shape together.

        Parameters
        ----------
        inputs : sequence of str
            Names of the model's inputs.
        labels : str or None
            What the array after them is called.

        Raises
        ------
        DataError
            If a batch without names holds fewer arrays, or more than inputs and labels.
        """
        names = [*inputs, *([labels] if labels is not None else [])]
        groups: dict[tuple[Any, ...], list[dict[str, NDArray[Any]]]] = {}
        for batch in self.batches:
            named = dict(batch) if isinstance(batch, Mapping) else _named(batch, inputs, names)
            kind = tuple((name, a.dtype, a.shape[1:]) for name, a in sorted(named.items()))
            groups.setdefault(kind, []).append(named)
        return [
            {name: np.concatenate([batch[name] for batch in group]) for name in group[0]}
            for group in groups.values()
        ]


Data = str | Path | InMemory  # samples, as a run takes them
SampleData = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any]  # and as users have them


def as_data(data: SampleData | None) -> Data | None:
    """Samples as the public functions take them: a path, or what holds arrays.

    Parameters
    ----------
    data : path, mapping of str to array, array, iterable, or None
        An iterable gives batches, as a ``torch.utils.data.DataLoader`` does: each a mapping, an
        array, or a sequence of arrays in the order of the model's inputs. Whatever NumPy makes an
        array of counts as one, tensors of torch on the CPU among them.

    Raises
    ------
    DataError
        If it is none of these, or gives no batch.
    """
    if data is None or isinstance(data, (str, Path, InMemory)):
        return data
    if isinstance(data, os.PathLike):
        return Path(data)
    if isinstance(data, Mapping) or hasattr(data, "__array__"):
        return InMemory((_batch(data),))
    if not isinstance(data, Iterable):
        raise DataError(
            f"samples of type {type(data).__name__} can't be read: give a path, a dict of arrays, "
            "an array, or an iterable of such batches"
        )
    batches = tuple(_batch(item) for item in data)
    if not batches:
        raise DataError("the iterable of samples is empty: one that was used up gives nothing")
    return InMemory(batches)


def _batch(item: Any) -> Batch:
    """One batch, with its arrays."""
    if isinstance(item, Mapping):
        return {str(name): _array(value) for name, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_array(value) for value in item]
    return [_array(item)]


def _array(value: Any) -> NDArray[Any]:
    """An array of samples; ``DataError`` if it has no axis of them."""
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever a tensor of another library raises
        raise DataError(f"samples of type {type(value).__name__} make no array: {error}") from None
    if array.ndim == 0:
        raise DataError(
            f"samples of type {type(value).__name__} have no axis of samples: give arrays with "
            "the samples along the first axis"
        )
    return array


def _named(
    batch: Sequence[NDArray[Any]], inputs: Sequence[str], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """The arrays of a batch by name, in the order of the model's inputs.

    What comes behind them is left out where no labels are asked for: loaders give them too.
    """
    if len(batch) < len(inputs) or len(batch) > max(len(names), len(inputs) + 1):
        raise DataError(
            f"a batch of the samples holds {len(batch)} arrays, the model takes {len(inputs)}: "
            f"give them by name, as a dict with {', '.join(inputs)}"
        )
    return dict(zip(names, batch, strict=False))
