"""What a model is fed: its declared inputs, the user's samples, or synthetic ones."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.errors import CrashError, ModelError, UsageError
from onnxlr.layers.tracing import trace
from onnxlr.model.attributes import int_attr
from onnxlr.model.constants import constant
from onnxlr.model.graph import is_standard
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
_MOST_ELEMENTS = 2**27  # of an input that is drawn
# What hands values on from its first input; from any of them.
_FORWARD = (
    *("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Flatten"),
    *("Slice", "Split", "Gather", "Expand", "Tile", "Pad"),
)
_JOINING = ("Concat", "Where", "Max", "Min")
_BY_NAME = ((r"mask", 1), (r"type_?id|segment", 0), (r"^sr$|sampl\w*_?rate", 16000))


class Runner(Protocol):
    """What a model can be run by, here or in another process."""

    def run(self, feed: Feed) -> object:
        """Run it; ``ModelError`` if it doesn't."""


@dataclass(frozen=True)
class InputSpec:
    """A graph input: name, NumPy type, and per axis a size, a symbol, or None."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.dims)
        return f"{self.name} {self.dtype.name}[{dims}]"

    @property
    def fixed_batch(self) -> int | None:
        """Size of the first axis if the model fixes it."""
        first = self.dims[0] if self.dims else None
        return first if isinstance(first, int) else None


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The inputs a user has to feed: those without an initializer.

    Raises
    ------
    ModelError
        If one is no tensor or has no declared type.
    """
    specs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        none = (None, ir.DataType.UNDEFINED)
        if not isinstance(value.type, ir.TensorType) or value.dtype in none or not value.dtype:
            raise ModelError(
                f"the input {value.name!r} is no tensor of a declared type: not supported"
            )
        if value.dtype == ir.DataType.STRING:
            raise ModelError(f"the input {value.name!r} takes strings: not supported")
        if value.shape is None:
            raise ModelError(
                f"the input {value.name!r} has no declared rank: export it with a shape"
            )
        dims = tuple(
            d if isinstance(d, int) and d > 0 else (getattr(d, "value", None) or None)
            for d in value.shape
        )
        specs.append(InputSpec(value.name or "", value.dtype.numpy(), dims))
    return tuple(specs)


def parse_shapes(texts: Sequence[str], specs: Sequence[InputSpec]) -> dict[str, Shape]:
    """Parse ``--shape NAME:1,3,224,224`` against the model's inputs.

    Raises
    ------
    UsageError
        For a name or a number of axes that the model doesn't have.
    """
    shapes: dict[str, Shape] = {}
    known = {spec.name: spec for spec in specs}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        # Ten digits are more than any axis has, and fewer than int() refuses.
        numbers = [int(s) if re.fullmatch(r"\d{1,10}", s) else 0 for s in sizes.split(",")]
        if not name or not all(0 < number < 2**31 for number in numbers):
            raise UsageError(f"--shape {text!r}: write NAME:1,3,224,224")
        if name not in known:
            raise UsageError(
                f"--shape {text!r}: {name!r} is no input, the model has {_listing(specs)}"
            )
        shape = tuple(numbers)
        dims = known[name].dims
        clash = len(shape) != len(dims) or any(
            isinstance(d, int) and d != s for d, s in zip(dims, shape, strict=True)
        )
        if clash:
            raise UsageError(f"--shape {text!r} contradicts the model's {known[name]}")
        shapes[name] = shape
    return shapes


def _listing(specs: Sequence[InputSpec]) -> str:
    return ", ".join(str(spec) for spec in specs)


def synthetic_feed(
    model: ir.Model, shapes: Mapping[str, Shape], rng: np.random.Generator, level: int = 0
) -> dict[str, NDArray[Any]]:
    """One feed of values that the graph can digest.

    Indices stay within the table they index, masks are ones, images lie in [0, 1) and other floats
    are standard normal. A higher ``level`` is more cautious with integers that nothing explains.
    """
    feed: dict[str, NDArray[Any]] = {}
    _check_sizes(model, shapes)
    values = {v.name: v for v in model.graph.inputs}
    for spec in input_specs(model):
        shape = shapes[spec.name]
        if np.issubdtype(spec.dtype, np.bool_):
            array: NDArray[Any] = np.ones(shape)
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
    """Refuse inputs that no memory is to be spent on."""
    for spec in input_specs(model):
        if math.prod(shapes[spec.name]) > _MOST_ELEMENTS:
            raise ModelError(
                f"the input {spec} would have {math.prod(shapes[spec.name]):,} elements: give "
                "smaller sizes with --shape, or real samples with --data"
            )


def _integer_range(value: ir.Value, spec: InputSpec, level: int) -> tuple[int, int]:
    if (size := _table_size(value)) is not None:
        return 0, size
    for pattern, number in _BY_NAME:
        if re.search(pattern, spec.name, re.IGNORECASE):
            return number, number + 1
    return (0, 100) if level == 0 else (1, 2)


def _table_size(value: ir.Value) -> int | None:
    """Rows of the smallest table that the values index, followed through reshapes and casts."""
    sizes, waiting, seen = [], [value], {value}
    while waiting:
        for node, slot in waiting.pop().uses():
            if is_standard(node, "Gather") and slot == 1:
                sizes.append(_rows(node))
            elif is_standard(node, "OneHot") and slot == 0:
                depth = constant(node.inputs[1])
                if depth is not None and depth.size == 1:
                    sizes.append(int(depth.numpy().reshape(-1)[0]))
            elif is_standard(node, *_JOINING) or (is_standard(node, *_FORWARD) and slot == 0):
                waiting += [value for value in node.outputs if value not in seen]
                seen.update(node.outputs)
    return min((size for size in sizes if size > 0), default=None)


def _rows(gather: ir.Node) -> int:
    """How many entries a Gather can choose from, of what is made of constants; else 0."""
    table, axis = trace(gather.inputs[0]), int_attr(gather, "axis", 0)
    stored = None if table is None else constant(table.root)
    if table is None or stored is None:
        return 0
    shape = stored.shape.numpy()
    # What is computed of a constant in its own way (dequantized, scaled) has its shape, as a rule.
    axes = table.perm or tuple(range(len(shape)))
    return int(shape[axes[axis]]) if -len(axes) <= axis < len(axes) else 0


def candidate_shapes(
    specs: Sequence[InputSpec], given: Mapping[str, Shape], batch: int
) -> Iterator[dict[str, Shape]]:
    """Static input shapes worth trying, the same symbol with the same size everywhere."""
    seen = set()
    for image, length in _SIZES:
        symbols: dict[str, int] = {}
        for spec in specs:
            for symbol, size in zip(spec.dims, given.get(spec.name, ()), strict=False):
                if isinstance(symbol, str):
                    symbols[symbol] = size
        shapes = {
            spec.name: given.get(spec.name) or _fill(spec, image, length, batch, symbols)
            for spec in specs
        }
        key = tuple(shapes.values())
        if key not in seen:
            seen.add(key)
            yield shapes


def _fill(
    spec: InputSpec, image: tuple[int, int], length: int, batch: int, symbols: Mapping[str, int]
) -> Shape:
    shape = []
    channels_last = len(spec.dims) == 4 and spec.dims[3] in (1, 3)
    for axis, dim in enumerate(spec.dims):
        if isinstance(dim, int):
            shape.append(dim)
        elif isinstance(dim, str) and dim in symbols:
            shape.append(symbols[dim])
        elif axis == 0 or (isinstance(dim, str) and re.search("batch", dim, re.IGNORECASE)):
            shape.append(batch)
        elif axis == 1 and len(spec.dims) == 3 and isinstance(spec.dims[0], int) and shape[0] > 1:
            shape.append(batch)  # a recurrent state: (layers, batch, features)
        elif len(spec.dims) == 4:
            places = (None, *image, None) if channels_last else (None, None, *image)
            shape.append(places[axis] or 3)
        else:
            shape.append(length)
    return tuple(shape)


def find_runnable_shapes(
    model: ir.Model, session: Runner, given: Mapping[str, Shape], batch: int, seed: int
) -> tuple[dict[str, Shape], int]:
    """Input shapes, and a level of caution, with which the model runs on synthetic inputs.

    Raises
    ------
    ModelError
        If none of the sizes worth trying runs, with the runtime's reason for the first.
    """
    specs = input_specs(model)
    first: ModelError | None = None
    for shapes in candidate_shapes(specs, given, batch):
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
    dynamic = any(not isinstance(d, int) for s in specs for d in s.dims)
    remedy = (
        f"give the sizes with --shape (inputs: {_listing(specs)})"
        if dynamic
        else ("does it run at all? give real samples with --data")
    )
    raise ModelError(f"{first}; {remedy}")


def synthetic_feeds(
    model: ir.Model, shapes: Mapping[str, Shape], level: int, seed: int, samples: int
) -> list[Feed]:
    """Feeds that hold about as many synthetic samples as asked for, seeded."""
    rng = np.random.default_rng(seed)
    first = next(iter(shapes.values()), ())
    runs = max(1, math.ceil(samples / max(1, first[0] if first else 1)))
    return [synthetic_feed(model, shapes, rng, level) for _ in range(runs)]
