"""The user's samples: .npz, .npy or a folder of such files, in the batches that a model takes."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.errors import DataError, one_line
from onnxlr.prepare.inputs import InputSpec
from onnxlr.system.in_memory import Data, InMemory
from onnxlr.system.npz import read_npz, read_text_array
from onnxlr.system.session import Feed

_READ_WHOLE = 256 << 20  # bytes after which arrays stay mapped, of those that can be
_DYNAMIC_BATCH = 16  # samples a run for models that leave the batch open


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples that fit a model's inputs.

    Attributes
    ----------
    label : str
        Where they come from, in messages.
    parts : tuple of dict
        For each file its arrays by input name, with the samples along the first axis.
    labels : ndarray of shape (n,) or None
        The class of each of the n samples of all files.
    index : ndarray of shape (k,)
        The k samples in use, counted through all files.
    specs : tuple of InputSpec
        The model's inputs.
    """

    label: str
    parts: tuple[dict[str, NDArray[Any]], ...]
    labels: NDArray[np.int64] | None
    index: NDArray[np.intp]
    specs: tuple[InputSpec, ...]

    def __len__(self) -> int:
        return len(self.index)

    def in_parts(self, seed: int, *counts: int) -> tuple["Samples", ...]:
        """Parts of these sizes, which have no sample in common, in a seeded order."""
        order = np.random.default_rng(seed).permutation(self.index)
        ends = np.cumsum(counts)
        return tuple(self._with(np.sort(part)) for part in np.split(order[: ends[-1]], ends[:-1]))

    def take(self, count: int) -> "Samples":
        """At most this many of the samples, evenly spread."""
        if len(self) <= count:
            return self
        return self._with(self.index[np.linspace(0, len(self) - 1, count).astype(np.intp)])

    def digest(self) -> str:
        """SHA-256 of the inputs in use."""
        content = hashlib.sha256()
        for feed, index, _ in self.batches():
            for name, array in sorted(feed.items()):
                content.update(f"{name} {array.dtype} {array.shape} {len(index)}".encode())
                if array.dtype == object:
                    content.update("\0".join(array.reshape(-1)).encode("utf-8", "surrogatepass"))
                else:
                    content.update(np.ascontiguousarray(array).view(np.uint8).data)
        return content.hexdigest()

    def _with(self, index: NDArray[np.intp]) -> "Samples":
        return Samples(self.label, self.parts, self.labels, index, self.specs)

    @property
    def batch(self) -> int:
        """Samples in a run: what the model fixes; one if an input has no axis of samples."""
        if any(self._has_whole_inputs(p) for p in range(len(self.parts))):
            return 1
        fixed = [s.fixed_batch for s in self.specs if s.fixed_batch is not None]
        return fixed[0] if fixed else _DYNAMIC_BATCH

    def batches(self, batch: int | None = None) -> Iterator[tuple[Feed, NDArray[np.intp], int]]:
        """Each feed with the indices of its samples and the number of rows, with those of padding.

        Samples of different shapes, from different files, never share a feed. A model with a fixed
        batch gets an incomplete feed filled up with repeats of the last sample.
        """
        size = batch or self.batch
        padded = any(s.fixed_batch is not None for s in self.specs)
        for index in self._groups(size):
            rows = np.pad(index, (0, size - len(index)), mode="edge") if padded else index
            yield self._feed(rows), index, len(rows)

    @property
    def runs(self) -> int:
        """The number of feeds in ``batches()``."""
        return sum(1 for _ in self._groups(self.batch))

    def _groups(self, size: int) -> Iterator[NDArray[np.intp]]:
        """The samples of each batch: all of one shape, whole inputs each in a batch alone."""
        part = self._part_of(self.index)
        shapes = [[p[s.name].shape[1:] for s in self.specs] for p in self.parts]
        start = 0
        while start < len(self.index):
            alone = self._has_whole_inputs(part[start])
            stop = min(start + (1 if alone else size), len(self.index))
            same = (shapes[p] == shapes[part[start]] for p in part[start:stop])
            count = sum(takewhile(bool, same))
            yield self.index[start : start + count]
            start += count

    def _has_whole_inputs(self, part: int) -> bool:
        """Whether a sample of a file is the whole array of an input, not a row of it."""
        arrays = self.parts[part]
        return any(arrays[s.name].ndim == len(s.axes) + 1 for s in self.specs)

    def _part_of(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """The file of each sample."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    @cached_property
    def _starts(self) -> NDArray[np.intp]:
        """The first sample of each file, counted through all of them."""
        return np.cumsum([0, *(_count(part) for part in self.parts[:-1])])

    def _feed(self, rows: NDArray[np.intp]) -> Feed:
        """The feed of these samples."""
        part = self._part_of(rows)
        feed = {}
        for spec in self.specs:
            arrays = [
                self.parts[p][spec.name][r - self._starts[p]]
                for p, r in zip(part, rows, strict=True)
            ]
            whole = self.parts[part[0]][spec.name].ndim == len(spec.axes) + 1
            feed[spec.name] = np.asarray(arrays[0] if whole else np.stack(arrays), order="C")
        return feed


def share_of(samples: int, share: tuple[int, int]) -> int:
    """How many samples a share of them is, at least one; its numerator and denominator."""
    return max(1, samples * share[0] // share[1])


def load_samples(
    data: Data,
    specs: Sequence[InputSpec],
    labels: str | None,
    *,
    labels_optional: bool = False,
) -> Samples:
    """Read samples and check them against a model's inputs.

    Parameters
    ----------
    data : str, Path or InMemory
        ``.npz`` with one array per input, ``.npy`` for a model with one input, or a folder of
        such files.
    specs : sequence of InputSpec
        The model's inputs. Those without a declared rank have that of the first file's arrays.
    labels : str or None
        Name of the array of integer labels.
    labels_optional : bool
        Whether files may lack the labels.

    Raises
    ------
    DataError
        If a file can't be read, or a name, shape or type doesn't fit the model.
    """
    if not specs:
        raise DataError(f"the model has no inputs that {data} could feed: leave out --data")
    parts, targets, nbytes = [], [], 0
    for place in _places(data, specs, labels):
        if isinstance(place, Path):
            file, arrays = place, _read(place, specs, mapped=nbytes > _READ_WHOLE)
        else:
            file, arrays = Path(str(data)), place
        specs = [s.with_rank(getattr(arrays.get(s.name), "ndim", 0)) for s in specs]
        nbytes += sum(array.nbytes for array in arrays.values())
        parts.append(_checked(arrays, specs, file))
        if labels is not None and not (labels_optional and labels not in arrays):
            targets.append(_labels(arrays, labels, file, _count(parts[-1])))
    total = sum(_count(part) for part in parts)
    if total == 0:
        raise DataError(f"{data} holds no samples: every array's first axis is 0 long")
    return Samples(
        str(data),
        tuple(parts),
        np.concatenate(targets) if targets else None,
        np.arange(total),
        tuple(specs),
    )


def _places(
    data: Data, specs: Sequence[InputSpec], labels: str | None
) -> Sequence[Path | dict[str, NDArray[Any]]]:
    """The files of samples, or their arrays where they are in memory."""
    if isinstance(data, InMemory):
        return data.arrays([spec.name for spec in specs], labels)
    return _files(Path(data))


def _files(path: Path) -> list[Path]:
    """The files of samples at a path; ``DataError`` if there are none."""
    try:
        return _list_files(path)
    except OSError as error:  # a name too long, a folder that can't be listed
        raise DataError(f"can't read {str(path)[:80]}: {error.strerror or error}") from None


def _list_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy"))
        if not files:
            raise DataError(f"the folder {path} holds no .npz or .npy files")
        return files
    if not path.exists():
        raise DataError(f"{path}: no such file or folder of samples")
    if path.suffix not in (".npz", ".npy"):
        raise DataError(f"{path} is neither .npz nor .npy: save the samples with numpy.savez")
    return [path]


def _read(file: Path, specs: Sequence[InputSpec], *, mapped: bool) -> dict[str, NDArray[Any]]:
    """The arrays of a file by their names; those of a .npy file may stay mapped."""
    if not file.is_file():  # reading a pipe would wait for its writer
        raise DataError(f"{file} is not a regular file: save the samples with numpy.savez")
    if file.suffix == ".npy" and len(specs) != 1:
        raise DataError(
            f"{file} is one array, the model has {len(specs)} inputs: save a .npz with "
            f"{', '.join(s.name for s in specs)}"
        )
    try:
        if file.suffix == ".npy" and specs[0].is_text:
            text = read_text_array(file)
            return {specs[0].name: np.load(file) if text is None else text}
        if file.suffix == ".npy":
            # A mapped array ends with its file: if that is cut short, this process crashes.
            array = np.lib.format.open_memmap(file, mode="r")
            mapped = mapped or array.nbytes > _READ_WHOLE
            return {specs[0].name: array if mapped else np.array(array)}
        return read_npz(file)
    except Exception as error:  # whatever zip, zlib and NumPy raise, the file is at fault
        reason = one_line(error)
    raise DataError(f"can't read {file}: {reason}; save it again with numpy.savez")


def _checked(
    arrays: dict[str, NDArray[Any]], specs: Sequence[InputSpec], file: Path
) -> dict[str, NDArray[Any]]:
    """The arrays of a file that are inputs; ``DataError`` if one lacks or doesn't fit."""
    part, counts = {}, {}
    for spec in specs:
        if spec.name not in arrays:
            raise DataError(
                f"{file} has no array {spec.name!r} for the input {spec}; it has "
                f"{', '.join(sorted(arrays)) or 'nothing'}"
            )
        array = arrays[spec.name]
        if spec.is_text and array.dtype.kind in "USO":
            array = _as_text(array, spec, file)
        if array.dtype != spec.dtype:
            kind = "text" if array.dtype.kind in "USO" else str(array.dtype)
            raise DataError(
                f"{file}: {spec.name!r} is {kind}, the model takes {spec.type_name}: convert "
                f"it with .astype({'str' if spec.is_text else repr(spec.dtype.name)})"
            )
        if array.ndim not in (len(spec.axes), len(spec.axes) + 1) or array.ndim == 0:
            raise DataError(
                f"{file}: {spec.name!r} has shape {list(array.shape)}, the model takes {spec} "
                "with the samples along the first axis"
                + (": give one number for each sample" if spec.dims == () else "")
            )
        whole = array.ndim == len(spec.axes) + 1
        dims = spec.axes if whole else spec.axes[1:]
        for axis, (size, dim) in enumerate(zip(array.shape[1:], dims, strict=True), 1):
            if isinstance(dim, int) and dim != size:
                raise DataError(
                    f"{file}: {spec.name!r} has shape {list(array.shape)}, the model takes {spec}: "
                    f"axis {axis} is {size}, not {dim}"
                )
        part[spec.name], counts[spec.name] = array, len(array)
    if len(set(counts.values())) > 1:
        raise DataError(
            f"{file}: the arrays hold different numbers of samples: "
            + ", ".join(f"{n} {c}" for n, c in counts.items())
        )
    return part


def _as_text(array: NDArray[Any], spec: InputSpec, file: Path) -> NDArray[Any]:
    """Strings as the runtime takes them: objects that are text."""
    try:
        texts = [t.decode() if isinstance(t, bytes) else str(t) for t in array.reshape(-1)]
    except UnicodeDecodeError:
        raise DataError(f"{file}: {spec.name!r} holds bytes that are no UTF-8 text") from None
    return np.array(texts, dtype=object).reshape(array.shape)


def _labels(
    arrays: dict[str, NDArray[Any]], name: str, file: Path, count: int
) -> NDArray[np.int64]:
    """The labels of a file's samples; ``DataError`` if they aren't that many integers."""
    if name not in arrays:
        raise DataError(
            f"{file} has no array {name!r} for the labels; it has {', '.join(sorted(arrays))}"
        )
    labels = np.asarray(arrays[name])
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{file}: the labels {name!r} are {labels.dtype}{list(labels.shape)}, expected "
            f"{count} integers{_as_integers(labels, count)}"
        )
    if labels.size and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{file}: the labels {name!r} run up to {labels.max()}, which is no class")
    return labels.astype(np.int64)


def _as_integers(labels: NDArray[Any], count: int) -> str:
    """What makes integers of labels that aren't, as far as they show it."""
    if labels.ndim == 2 and len(labels) == count and labels.dtype.kind in "biuf":
        return ": where each row marks its class, take .argmax(1)"
    if labels.shape != (count,):
        return ""
    if labels.dtype.kind in "bf":
        return ": convert them with .astype('int64')"
    return ": give the number of each one's class"


def _count(part: dict[str, NDArray[Any]]) -> int:
    """The number of samples in a file."""
    return len(next(iter(part.values())))
