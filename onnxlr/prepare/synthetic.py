"""Synthetic inputs for a model: sizes with which it runs, and values that it accepts."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.errors import CrashError, ModelError
from onnxlr.layers.tracing import trace
from onnxlr.model.attributes import int_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard
from onnxlr.prepare.dimensions import Sizes
from onnxlr.prepare.inputs import Dims, InputSpec, check_ranks, input_specs, list_inputs
from onnxlr.system.session import Feed
from onnxlr.types import Shape

# Sizes to try for the dynamic axes of images (height, width) and of sequences, until one runs.
_SIZES = (
    ((224, 224), 128),
    ((320, 320), 512),
    ((48, 320), 576),
    ((32, 320), 16000),
    ((256, 256), 64),
    ((64, 64), 32),
    ((32, 32), 16),
    ((28, 28), 8),
)
_MOST_ELEMENTS = 2**27  # elements of a synthetic input
# Operators that hand on the values of their first input, and of any input.
_FORWARD = (
    *("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Flatten"),
    *("Slice", "Split", "Gather", "Expand", "Tile", "Pad", "StringNormalizer"),
)
_JOINING = ("Concat", "Where", "Max", "Min")
# Attributes of LabelEncoder, CategoryMapper, OneHotEncoder and TfIdfVectorizer.
_VOCABULARIES = ("keys_strings", "cats_strings", "pool_strings", "classes_strings")
_BY_NAME = ((r"mask", 1), (r"type_?id|segment", 0), (r"^sr$|sampl\w*_?rate", 16000))


class Runner(Protocol):
    """A model that can be run, in this process or in another."""

    def run(self, feed: Feed) -> object:
        """Run the model on a feed; ``ModelError`` if it fails."""


def synthetic_feed(
    model: ir.Model, shapes: Mapping[str, Shape], rng: np.random.Generator, level: int = 0
) -> dict[str, NDArray[Any]]:
    """One feed of values that the graph can digest.

    Indices stay within the table they index, masks are ones, images lie in [0, 1) and other floats
    are standard normal.

    Parameters
    ----------
    model : onnx_ir.Model
    shapes : mapping of str to tuple of int
        A static shape for every input.
    rng : numpy.random.Generator
    level : int
        0, or 1 for more caution with integers whose meaning is unclear.

    Raises
    ------
    ModelError
        If an input would be too large.
    """
    feed: dict[str, NDArray[Any]] = {}
    _check_sizes(model, shapes)
    values = {v.name: v for v in model.graph.inputs}
    for spec in input_specs(model):
        shape = shapes[spec.name]
        array: NDArray[Any]
        if spec.is_text:
            words = np.array(_words(values[spec.name]), dtype=object)
            array = words[rng.integers(0, len(words), size=shape)]
        elif np.issubdtype(spec.dtype, np.bool_):
            array = np.ones(shape)
        elif np.issubdtype(spec.dtype, np.integer):
            low, high = _integer_range(values[spec.name], spec, level)
            array = rng.integers(low, high, size=shape)
        elif len(shape) == 4 and (shape[1] in (1, 3) or shape[3] in (1, 3)):
            array = rng.random(size=shape)
        else:
            array = rng.standard_normal(size=shape)
        feed[spec.name] = np.asarray(array).astype(spec.dtype)
    return feed


def _check_sizes(model: ir.Model, shapes: Mapping[str, Shape]) -> None:
    """Raise ``ModelError`` for an input that would take too much memory."""
    for spec in input_specs(model):
        if math.prod(shapes[spec.name]) > _MOST_ELEMENTS:
            raise ModelError(
                f"the input {spec} would have {math.prod(shapes[spec.name]):,} elements: give "
                "smaller sizes with --shape, or real samples with --data"
            )


def _integer_range(value: ir.Value, spec: InputSpec, level: int) -> tuple[int, int]:
    """The range of an integer input, without its end: by the table it indexes, or by its name."""
    if (size := _table_size(value)) is not None:
        return 0, size
    for pattern, number in _BY_NAME:
        if re.search(pattern, spec.name, re.IGNORECASE):
            return number, number + 1
    return (0, 100) if level == 0 else (1, 2)


def _table_size(value: ir.Value) -> int | None:
    """Rows of the smallest table that a value indexes, through reshapes and casts; None if none."""
    sizes = []
    for node, slot in _readers(value):
        if is_standard(node, "Gather") and slot == 1:
            sizes.append(_rows(node))
        elif is_standard(node, "OneHot") and slot == 0:
            depth = constant(node.inputs[1])
            if depth is not None and depth.size == 1:
                sizes.append(int(depth.numpy().reshape(-1)[0]))
    return min((size for size in sizes if size > 0), default=None)


def _words(value: ir.Value) -> list[str]:
    """The words that what reads an input of strings knows; some words where that can't be told."""
    for node, _ in _readers(value):
        for name in _VOCABULARIES:
            attribute = node.attributes.get(name)
            is_list = attribute is not None and attribute.type == ir.AttributeType.STRINGS
            if attribute is not None and is_list and attribute.as_strings():
                return [*attribute.as_strings()]
    return ["one", "two", "three"]


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that read a value, through those that hand it on, with the inputs it has there."""
    waiting, visited = [value], {value}
    while waiting:
        for node, slot in waiting.pop().uses():
            yield node, slot
            if is_standard(node, *_JOINING) or (is_standard(node, *_FORWARD) and slot == 0):
                waiting += [value for value in node.outputs if value not in visited]
                visited.update(node.outputs)


def _rows(gather: ir.Node) -> int:
    """The number of entries of a Gather's table if that is made of constants, else 0."""
    table, axis = trace(gather.inputs[0]), int_attr(gather, "axis", 0)
    stored = None if table is None else constant(table.root)
    if table is None or stored is None:
        return 0
    shape = stored.shape.numpy()
    # A table that is computed from a constant (dequantized, scaled) has its shape, as a rule.
    axes = table.perm or tuple(range(len(shape)))
    return int(shape[axes[axis]]) if -len(axes) <= axis < len(axes) else 0


def candidate_shapes(
    specs: Sequence[InputSpec], fixed: Mapping[str, Shape], batch: int
) -> Iterator[dict[str, Shape]]:
    """Static input shapes worth trying, in which sizes hang together as the model says.

    Inputs of unknown rank have none, unless the user has set one.

    Parameters
    ----------
    specs : sequence of InputSpec
    fixed : mapping of str to tuple of int
        Shapes of inputs that the user has set.
    batch : int
        Size of dynamic sample axes.
    """
    texts = dict.fromkeys(d for s in specs for d in s.dims or () if isinstance(d, str))
    tried = set()
    for image, length, past in _sizes_to_try([t for t in texts if re.search("past", t)]):
        sizes = Sizes(texts)
        for spec in specs:
            for dim, size in zip(spec.dims or (), fixed.get(spec.name, ()), strict=False):
                if isinstance(dim, str):
                    sizes.set(dim, size)
        for symbol, size in past.items():
            if sizes.get(symbol) is None:
                sizes.set(symbol, size)
        guesses = {
            s.name: _guess(s.dims, image, length, batch) for s in specs if s.dims is not None
        }
        for spec in specs:
            for dim, size in zip(spec.dims or (), guesses.get(spec.name, ()), strict=True):
                if dim in sizes.symbols and sizes.get(str(dim)) is None:
                    sizes.set(str(dim), size)
        shapes = {
            spec.name: fixed.get(spec.name) or _fill(spec.axes, guesses[spec.name], sizes)
            for spec in specs
            if spec.name in fixed or spec.dims is not None
        }
        key = tuple(shapes.values())
        if key not in tried:
            tried.add(key)
            yield shapes


def _sizes_to_try(
    past: Sequence[str],
) -> Iterator[tuple[tuple[int, int], int, Mapping[str, int]]]:
    """Sizes of images and of sequences, and of the symbols of what decoders have cached."""
    for image, length in _SIZES:
        yield image, length, {}
    if past:
        (image, length), *_ = _SIZES
        yield image, length, dict.fromkeys(past, 0)
        yield image, 1, dict.fromkeys(past, length)


def _fill(dims: Dims, guess: Shape, sizes: Sizes) -> Shape:
    """A static shape: the sizes that are fixed, those that follow from symbols, or the guess."""
    known = (sizes.get(dim) if isinstance(dim, str) else dim for dim in dims)
    return tuple(g if size is None else size for size, g in zip(known, guess, strict=True))


def _guess(dims: Dims, image: tuple[int, int], length: int, batch: int) -> Shape:
    """What the axes of an input suggest where they are open."""
    shape: list[int] = []
    channels_last = len(dims) == 4 and dims[3] in (1, 3)
    for axis, dim in enumerate(dims):
        if isinstance(dim, int):
            shape.append(dim)
        elif axis == 0 or (isinstance(dim, str) and re.search("batch", dim, re.IGNORECASE)):
            shape.append(batch)
        elif axis == 1 and len(dims) == 3 and isinstance(dims[0], int) and shape[0] > 1:
            shape.append(batch)  # a recurrent state: (layers, batch, features)
        elif len(dims) == 4:
            cached = isinstance(dim, str) and re.search("past|seq", dim)
            places = (None, *image, None) if channels_last else (None, None, *image)
            shape.append(length if cached else places[axis] or 3)
        else:
            shape.append(length)
    return tuple(shape)


def find_runnable_shapes(
    model: ir.Model, session: Runner, fixed: Mapping[str, Shape], batch: int, seed: int
) -> tuple[dict[str, Shape], int]:
    """Input shapes, and a level of caution, with which the model runs on synthetic inputs.

    Parameters
    ----------
    model : onnx_ir.Model
    session : Runner
        The model, opened.
    fixed : mapping of str to tuple of int
        Shapes of inputs that the user has set.
    batch : int
        Size of dynamic sample axes.
    seed : int

    Raises
    ------
    ModelError
        If the model runs with none of the sizes; the message has the reason for the first.
    """
    specs = input_specs(model)
    check_ranks(specs, fixed)
    first: ModelError | None = None
    for shapes in candidate_shapes(specs, fixed, batch):
        for level in (0, 1):
            feed = synthetic_feed(model, shapes, np.random.default_rng(seed), level)
            try:
                session.run(feed)
            except ModelError as error:
                first = first or error
            else:
                return shapes, level
    if isinstance(first, CrashError):
        raise first
    dynamic = [s for s in specs if any(not isinstance(d, int) for d in s.dims or ())]
    if not dynamic:
        raise ModelError(f"{first}; does it run at all? give real samples with --data")
    raise ModelError(f"{first}; give the sizes with --shape ({list_inputs(dynamic)})")


def synthetic_feeds(
    model: ir.Model, shapes: Mapping[str, Shape], level: int, seed: int, samples: int
) -> list[Feed]:
    """Seeded feeds that hold about this many synthetic samples together."""
    rng = np.random.default_rng(seed)
    first = next(iter(shapes.values()), ())
    runs = max(1, math.ceil(samples / max(1, first[0] if first else 1)))
    return [synthetic_feed(model, shapes, rng, level) for _ in range(runs)]
