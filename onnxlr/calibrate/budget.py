"""How many samples there is time for, by the work in each."""

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
    shape = next(iter(prepared.input_shapes.values()), ())
    samples = max(1, shape[0]) if shape else 1  # an input may be empty
    return max(Work(macs, 0, 1).usual_ms / 1e3 / samples, 1e-6)
