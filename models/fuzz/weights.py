"""Ways to break the weights of a sound ONNX model: their dimensions, types and values."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from models.fuzz.basics import FLOATS, NUMBERS, Rng, any_weight, pick


def odd_dims(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight declares other dimensions than it has data for."""
    tensor = any_weight(model, rng)
    dims = [int(d) for d in tensor.dims]
    change = int(rng.integers(4))
    if change == 0 and dims:
        dims[int(rng.integers(len(dims)))] = pick(rng, NUMBERS)
    elif change == 1:
        dims = []
    elif change == 2:
        dims = [*dims, pick(rng, (0, 1))]
    else:
        dims = [int(np.prod(dims, dtype=object))]
    tensor.dims[:] = [d for d in dims if -(2**63) <= d < 2**63]
    if rng.random() < 0.5:
        tensor.raw_data = tensor.raw_data[: 4 * int(rng.integers(3))]


def empty_weight(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight, well-formed, of no elements, one element or no axes."""
    tensor = any_weight(model, rng)
    width = len(tensor.raw_data) // max(1, int(np.prod(tensor.dims or [1])))
    dims = pick(rng, ([0], [0, 24], [24, 0], [], [1], [1, 1], [1] * 70, [0] * 9))
    tensor.dims[:] = dims
    tensor.raw_data = b"\0" * (width * int(np.prod(dims, dtype=np.int64)))


def other_type(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight says it is of another type: strings, four bits, complex, none."""
    tensor = any_weight(model, rng)
    tensor.data_type = int(rng.integers(0, 30))
    if rng.random() < 0.5:
        per = {8: 0, 10: 2, 11: 8, 14: 8, 15: 16, 16: 2, 2: 1, 3: 1}.get(tensor.data_type, 1)
        count = max(0, int(np.prod(tensor.dims or [1])))
        tensor.raw_data = b"\x3f" * min(count * per, 1 << 20)
    if tensor.data_type == TensorProto.STRING and rng.random() < 0.7:
        tensor.ClearField("raw_data")
        tensor.string_data.extend([b"\xff"] * min(1 << 10, int(np.prod(tensor.dims or [1]))))


def odd_values(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight holds NaN, infinity, denormals, huge or all equal values."""
    tensor = any_weight(model, rng)
    if tensor.data_type != TensorProto.FLOAT or not tensor.raw_data:
        return
    values = np.frombuffer(tensor.raw_data, np.float32).copy()
    odd = pick(rng, (*FLOATS, 3e38, 1e-40, 1e20))
    some = rng.random(len(values)) < pick(rng, (0.01, 0.5, 1.1))
    tensor.raw_data = np.where(some, np.float32(odd), values).astype(np.float32).tobytes()


def other_fields(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight keeps its values in typed fields: the right one, a wrong one, or too few."""
    tensor = any_weight(model, rng)
    values = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 4 * 4], np.float32)
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")
    cut = len(values) - int(rng.integers(0, 3))
    change = int(rng.integers(4))
    if change == 0:
        tensor.float_data.extend(values[: max(0, cut)].tolist())
    elif change == 1:
        tensor.int32_data.extend([70_000, -1] * (cut // 2))
    elif change == 2:
        tensor.int64_data.extend([2**62] * max(0, cut))
    else:
        tensor.double_data.extend([1e300] * max(0, cut))
