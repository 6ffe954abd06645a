"""How many samples there is time for, by the work in each."""

from onnxlr.layers.macs import count_macs
from onnxlr.methods.cost import Work
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples

MOST_SAMPLES = 8192  # that are looked at, where there is time for them
_ALWAYS = 1024  # however long they take
_CALIBRATION_SECONDS = 60.0


def calibration_samples(prepared: Prepared, samples: Samples) -> Samples:
    """As many of the samples as factors are fitted to: a minute's worth, and 1,024 in any case."""
    affordable = int(_CALIBRATION_SECONDS / sample_seconds(prepared))
    return samples.take(min(MOST_SAMPLES, max(_ALWAYS, affordable)))


def sample_seconds(prepared: Prepared) -> float:
    """What one sample takes, by the work in it: a measured time would choose by chance."""
    macs = count_macs(prepared.model, prepared.shapes)
    shape = next(iter(prepared.input_shapes.values()), ())
    samples = max(1, shape[0]) if shape else 1  # an input may be empty
    return max(Work(macs, 0, 1).usual_ms / 1e3 / samples, 1e-6)
