"""How many samples there is time for, estimated from the work in each."""

import math
from collections.abc import Collection

from onnxlr.layers.kernel import matrix_sides
from onnxlr.layers.macs import count_macs
from onnxlr.limits import Limits
from onnxlr.methods.cost import Work
from onnxlr.prepare.prepared import Prepared, samples_at_once
from onnxlr.prepare.samples import Samples

_PASSES = 4  # through the model, that take as long as a sample's part in a correction: measured
_REST, _LESS = 0.1, 1 / 8  # of the work, whose layers get by with this share of the inputs


def calibration_samples(prepared: Prepared, samples: Samples, limits: Limits) -> Samples:
    """The samples that factors are fitted to: as many as there is time for, within the limits."""
    affordable = affordable_samples(prepared, limits.fit_seconds)
    return samples.take(min(limits.fit_samples, max(limits.fit_samples_always, affordable)))


def probed_samples(prepared: Prepared, samples: Samples, limits: Limits) -> Samples:
    """The samples that sensitivities are measured on, of those that factors are fitted to."""
    affordable = affordable_samples(prepared, limits.probe_seconds)
    return samples.take(min(limits.probe_samples, max(limits.probe_samples_least, affordable)))


def affordable_samples(prepared: Prepared, seconds: float) -> int:
    """How many samples can be run in some seconds, estimated from the work."""
    return int(seconds / sample_seconds(prepared))


def sample_seconds(prepared: Prepared) -> float:
    """Seconds of one sample, estimated from its work, since measured times vary by chance."""
    macs = count_macs(prepared.model, prepared.shapes)
    return max(Work(macs, 0, 1).usual_ms / 1e3 / samples_at_once(prepared), 1e-6)


def correcting_seconds(prepared: Prepared) -> float:
    """Seconds that one sample takes in a sequential correction, estimated from the work.

    It goes through the original and the model so far once, in parts, and inputs are summed.
    """
    return _PASSES * sample_seconds(prepared)


def samples_for_regression(prepared: Prepared, names: Collection[str], rows: int) -> int:
    """The number of samples that give layers so many input vectors for each element of a vector.

    One image gives a convolution an input vector for each position of its output, and a dense layer
    one in all. So a small classifier after convolutions would need more samples than all of them
    together: layers with a tenth of the work may have an eighth of the vectors.
    """
    needs = []
    for layer in prepared.layers:
        if layer.name in names and layer.macs and layer.params:
            each = layer.macs / layer.params / samples_at_once(prepared)
            needs.append((rows * matrix_sides(layer)[2] / each, layer.macs))
    total, behind = sum(macs for _, macs in needs), 0
    enough = max((need for need, _ in needs), default=0.0) * _LESS
    for need, macs in sorted(needs, reverse=True):
        behind += macs
        if behind > _REST * total:
            return math.ceil(max(need, enough))
    return 0
