"""How many samples there is time for, by the work in each."""

import math
from collections.abc import Collection

from onnxlr.layers.kernel import matrix_sides
from onnxlr.layers.macs import count_macs
from onnxlr.limits import Limits
from onnxlr.methods.cost import Work
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples


def calibration_samples(prepared: Prepared, samples: Samples, limits: Limits) -> Samples:
    """The samples that factors are fitted to: as many as there is time for, within the limits."""
    affordable = int(limits.fit_seconds / sample_seconds(prepared))
    return samples.take(min(limits.fit_samples, max(limits.fit_samples_always, affordable)))


def sample_seconds(prepared: Prepared) -> float:
    """Seconds that one sample takes, by the work in it: a measured time would choose by chance."""
    macs = count_macs(prepared.model, prepared.shapes)
    return max(Work(macs, 0, 1).usual_ms / 1e3 / _at_once(prepared), 1e-6)


def samples_for_regression(prepared: Prepared, names: Collection[str], rows: int) -> int:
    """Samples in which every one of some layers is given so many inputs for each element of one.

    One image gives a convolution an input for each position of its output, and a dense layer one
    in all.
    """
    most = 0.0
    for layer in prepared.layers:
        if layer.name in names and layer.macs and layer.params:
            each = layer.macs / layer.params / _at_once(prepared)
            most = max(most, rows * matrix_sides(layer)[2] / each)
    return math.ceil(most)


def _at_once(prepared: Prepared) -> int:
    """Samples of one run."""
    shape = next(iter(prepared.input_shapes.values()), ())
    return max(1, shape[0]) if shape else 1  # an input may be empty
