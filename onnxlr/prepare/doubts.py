"""Signs that the samples aren't those that the model was made for."""

import hashlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.model.constants import constant, to_float64
from onnxlr.model.graph import is_standard
from onnxlr.prepare.inputs import InputSpec
from onnxlr.prepare.samples import Samples
from onnxlr.system.session import Feed

_FEW = 30
_LOOKED_AT = 64  # samples whose values are looked at
_HASHED = 20_000  # samples that are compared with each other
_PIXEL, _LEAST_PIXEL = 255, 100  # the largest value of a byte; what is below 100 may be counts
_SCALED = 1.5  # a value that pixels between 0 and 1 stay below
_PASSING = ("Cast", "Flatten", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_WEIGHING = ("Conv", "Gemm", "MatMul")


def doubts_about(samples: Samples, model: ir.Model) -> tuple[str, ...]:
    """Sentences about what looks wrong with samples; none if nothing does.

    Parameters
    ----------
    samples : Samples
        All of the user's.
    model : onnx_ir.Model
    """
    return (*_number_doubts(samples), *_scale_doubts(samples, model))


def _number_doubts(samples: Samples) -> Iterator[str]:
    """Whether there are few, and whether some are the same or no numbers."""
    count = len(samples)
    if count < _FEW:
        yield (
            f"{count} sample{'s are' if count > 1 else ' is'} very few: factors are fitted to a "
            "part of them, and the rest can't show much; a few hundred are worth more than any "
            "setting"
        )
    looked_at = samples.take(_HASHED)
    different, unknown = set[bytes](), 0
    for feed, _, _ in looked_at.batches(1):
        different.add(_digest(feed))
        unknown += _has_nan(feed)
    if unknown:
        yield (
            f"{unknown:,} of {len(looked_at):,} samples hold NaN, which says nothing of the "
            "model on others: leave them out, or fill them as in training"
        )
    if (repeated := len(looked_at) - len(different)) > 0:
        yield (
            f"{repeated:,} of {len(looked_at):,} samples repeat others: a copy among the test "
            "samples makes the loss look smaller than it is on new data"
        )


def _has_nan(feed: Feed) -> bool:
    return any(a.dtype.kind == "f" and bool(np.isnan(a).any()) for a in feed.values())


def _digest(feed: Feed) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for _, array in sorted(feed.items()):
        content.update(f"{array.dtype}{array.shape}".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.digest()


def _scale_doubts(samples: Samples, model: ir.Model) -> Iterator[str]:
    """Whether pixels come on another scale than the first layer takes."""
    feeds = [feed for feed, _, _ in samples.take(_LOOKED_AT).batches(1)]
    values = {value.name: value for value in model.graph.inputs}
    for spec in samples.specs:
        if spec.dtype.kind != "f" or not _is_image(spec):
            continue
        arrays = [feed[spec.name] for feed in feeds]
        low = min(float(a.min(initial=0)) for a in arrays)
        high = max(float(a.max(initial=0)) for a in arrays)
        pixels = low >= 0 and high <= _PIXEL and all(_are_whole(a) for a in arrays)
        first = _first_step(values[spec.name])
        if first in _WEIGHING and pixels and high > _LEAST_PIXEL:
            yield (
                f"the samples of {spec.name!r} are whole numbers up to {high:g}, and {first} takes "
                "them as they are: most networks are trained on pixels that were divided by 255, "
                "and often normalized; were these prepared as in training?"
            )
        if first == "Div by 255" and high <= _SCALED:
            yield (
                f"the samples of {spec.name!r} are at most {high:g}, and the model divides them by "
                "255 itself: it takes pixels from 0 to 255"
            )


def _is_image(spec: InputSpec) -> bool:
    return spec.dims is not None and len(spec.dims) >= 3


def _are_whole(array: NDArray[np.generic]) -> bool:
    return bool((array == np.floor(array.astype(np.float64))).all())


def _first_step(value: ir.Value) -> str:
    """The operator that first computes with an input; empty where several do, or none is told."""
    while True:
        nodes = list(value.consumers())
        if len(nodes) != 1:
            return ""
        (node,) = nodes
        if not any(is_standard(node, op) for op in _PASSING):
            break
        value = node.outputs[0]
    if node.op_type in ("Div", "Mul") and is_standard(node, node.op_type):
        tensor = constant(next((v for v in node.inputs if v is not value), None))
        if tensor is not None and tensor.size:
            factors = to_float64(tensor)
            scale = factors if node.op_type == "Div" else 1 / np.where(factors == 0, 1, factors)
            if np.allclose(scale, _PIXEL, rtol=0.01):
                return "Div by 255"
    return node.op_type if node.op_type in _WEIGHING and node.inputs[0] is value else ""
