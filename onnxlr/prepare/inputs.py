"""A model's inputs: their names, types and sizes, and the sizes that a user sets."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxlr.errors import ModelError, UsageError
from onnxlr.model.protobuf import OTHER_TYPE
from onnxlr.types import Shape

# For each axis a size, what stands there in its place, or None.
Dims = tuple[int | str | None, ...]

_MOST_LISTED = 4  # inputs in a message


@dataclass(frozen=True)
class InputSpec:
    """A graph input: its name, its NumPy type, and its axes, which are None if it declares none."""

    name: str
    dtype: np.dtype[Any]
    dims: Dims | None

    def __str__(self) -> str:
        if self.dims is None:
            return f"{self.name} {self.type_name} of unknown rank"
        dims = ", ".join("?" if d is None else str(d) for d in self.dims)
        return f"{self.name} {self.type_name}[{dims}]"

    @property
    def type_name(self) -> str:
        """Its type in words."""
        return "string" if self.is_text else self.dtype.name

    @property
    def is_text(self) -> bool:
        """Whether it takes strings, which are objects in NumPy."""
        return self.dtype == np.dtype(object)

    @property
    def axes(self) -> Dims:
        """Its axes, where the rank is known."""
        assert self.dims is not None
        return self.dims

    @property
    def fixed_batch(self) -> int | None:
        """The size of the first axis if the model fixes it, else None."""
        first = self.dims[0] if self.dims else None
        return first if isinstance(first, int) else None

    def with_rank(self, rank: int) -> "InputSpec":
        """The same with this many open axes, where it declares none."""
        return self if self.dims is not None else replace(self, dims=(None,) * rank)


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The inputs that samples feed: tensors without an initializer.

    Optional ones are left out, and so are those that ``check_feedable`` refuses.

    Raises
    ------
    ModelError
        If one has no declared type.
    """
    specs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers or _kind(value) != "tensor":
            continue
        assert value.dtype is not None
        text = value.dtype == ir.DataType.STRING
        dims = None if value.shape is None else tuple(map(_dim, value.shape, itertools.count()))
        dtype = np.dtype(object) if text else value.dtype.numpy()
        specs.append(InputSpec(value.name or "", dtype, dims))
    return tuple(specs)


def check_feedable(model: ir.Model) -> None:
    """Refuse inputs that no file of samples holds.

    Raises
    ------
    ModelError
        For the first sequence or map.
    """
    for value in model.graph.inputs:
        if (kind := _kind(value)) not in ("tensor", "optional"):
            raise ModelError(
                f"the input {value.name!r} is a {kind}, which no file of samples holds: --verify "
                "layers compares each layer alone"
            )


def _kind(value: ir.Value) -> str:
    """What an input is: a tensor, optional, a sequence or a map."""
    if isinstance(value.type, ir.OptionalType):
        return "optional"
    if isinstance(value.type, ir.SequenceType):
        return "sequence"
    if OTHER_TYPE in value.meta:
        return "map"
    none = (None, ir.DataType.UNDEFINED)
    if not isinstance(value.type, ir.TensorType) or value.dtype in none or not value.dtype:
        raise ModelError(f"the input {value.name!r} has no declared type: export the model again")
    return "tensor"


def _dim(dim: object, axis: int) -> int | str | None:
    """The size of an axis, or its symbol; a cache may be declared empty, samples may not."""
    if isinstance(dim, int):
        return dim if dim > 0 or (axis > 0 and dim == 0) else None
    return getattr(dim, "value", None) or None


def check_ranks(specs: Sequence[InputSpec], fixed: Mapping[str, Shape]) -> None:
    """Refuse inputs without a declared rank that nobody has given sizes.

    Raises
    ------
    ModelError
        For the first of them.
    """
    for spec in specs:
        if spec.dims is None and spec.name not in fixed:
            raise ModelError(
                f"the input {spec.name!r} declares no rank: give samples with --data, or "
                f"sizes with --shape {spec.name}:1,3,224,224"
            )


def parse_shapes(texts: Sequence[str], specs: Sequence[InputSpec]) -> dict[str, Shape]:
    """Input shapes by name from texts such as ``NAME:1,3,224,224``.

    Raises
    ------
    UsageError
        If a text has another form, or names an input or sizes that the model doesn't have.
    """
    shapes: dict[str, Shape] = {}
    inputs = {spec.name: spec for spec in specs}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        # Ten digits are more than any axis has, and fewer than int() refuses.
        numbers = [int(s) if re.fullmatch(r"\d{1,10}", s) else -1 for s in sizes.split(",")]
        # What a decoder has cached may be empty; a run without samples says nothing.
        if not name or numbers[0] == 0 or not all(0 <= number < 2**31 for number in numbers):
            raise UsageError(f"--shape {text!r}: write NAME:1,3,224,224")
        if name not in inputs:
            raise UsageError(
                f"--shape {text!r}: {name!r} is no input, the model has {list_inputs(specs)}"
            )
        shape = tuple(numbers)
        dims = inputs[name].with_rank(len(shape)).axes
        clash = len(shape) != len(dims) or any(
            isinstance(d, int) and d != s for d, s in zip(dims, shape, strict=True)
        )
        if clash:
            raise UsageError(f"--shape {text!r} contradicts the model's {inputs[name]}")
        shapes[name] = shape
    return shapes


def list_inputs(specs: Sequence[InputSpec]) -> str:
    """The inputs in words, of many the first."""
    more = len(specs) - _MOST_LISTED
    listed = ", ".join(str(spec) for spec in specs[:_MOST_LISTED])
    return f"{listed} and {more} more" if more > 0 else listed
