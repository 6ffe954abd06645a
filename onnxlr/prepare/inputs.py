"""A model's inputs: their names, types and sizes, and the sizes that a user sets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxlr.errors import ModelError, UsageError
from onnxlr.types import Shape


@dataclass(frozen=True)
class InputSpec:
    """A graph input: its name, its NumPy type, and for each axis a size, a symbol or None."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.dims)
        return f"{self.name} {self.dtype.name}[{dims}]"

    @property
    def fixed_batch(self) -> int | None:
        """The size of the first axis if the model fixes it, else None."""
        first = self.dims[0] if self.dims else None
        return first if isinstance(first, int) else None


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The inputs that a caller has to feed: those without an initializer.

    Raises
    ------
    ModelError
        If one is no tensor, takes strings, or has no declared type or rank.
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
        numbers = [int(s) if re.fullmatch(r"\d{1,10}", s) else 0 for s in sizes.split(",")]
        if not name or not all(0 < number < 2**31 for number in numbers):
            raise UsageError(f"--shape {text!r}: write NAME:1,3,224,224")
        if name not in inputs:
            raise UsageError(
                f"--shape {text!r}: {name!r} is no input, the model has {list_inputs(specs)}"
            )
        shape = tuple(numbers)
        dims = inputs[name].dims
        clash = len(shape) != len(dims) or any(
            isinstance(d, int) and d != s for d, s in zip(dims, shape, strict=True)
        )
        if clash:
            raise UsageError(f"--shape {text!r} contradicts the model's {inputs[name]}")
        shapes[name] = shape
    return shapes


def list_inputs(specs: Sequence[InputSpec]) -> str:
    """The inputs in words."""
    return ", ".join(str(spec) for spec in specs)
