"""The calibrate stage: moments of the layers' inputs, from the cache or from the samples."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxlr.calibrate.budget import calibration_samples
from onnxlr.calibrate.calibration import Calibration
from onnxlr.calibrate.collect import calibrate
from onnxlr.calibrate.influence import influences
from onnxlr.calibrate.kept import read_statistics, write_statistics
from onnxlr.calibrate.statistics import Statistics
from onnxlr.layers.layer import Layer
from onnxlr.options import Options
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Progress
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.pool import Pool
from onnxlr.system.session import ONE_CPU_THREAD


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Moments of the layers' inputs, and all that factors depend on.

    Attributes
    ----------
    statistics : mapping of str to Statistics
        By layer name; empty where factors are fitted to the weights alone.
    calibration : Calibration or None
        The samples that they come from.
    origin : str
        Digest of all that factors depend on besides the method and the rank.
    """

    statistics: Mapping[str, Statistics]
    calibration: Calibration | None
    origin: str

    @property
    def digest(self) -> str:
        """The digest of the samples; empty where no factor depends on any."""
        calibration = self.calibration
        return "" if calibration is None or not calibration.layers else calibration.digest


def calibrate_layers(
    prepared: Prepared,
    fitted: Sequence[Layer],
    feeding: Feeding | None,
    options: Options,
    cache: Cache,
    pool: Pool,
    progress: Progress,
    *,
    sized_by: Prepared | None = None,
) -> Calibrated:
    """Moments of some layers' inputs on the samples: from the cache, or by running the model.

    Parameters
    ----------
    prepared : Prepared
    fitted : sequence of Layer
        Those that some method fits.
    feeding : Feeding or None
        What the model is run on; None where it isn't run.
    options : Options
    cache : Cache
    pool : Pool
    progress : Progress
    sized_by : Prepared, optional
        The model by which it is told how many samples there is time for, if it isn't this one.
    """
    # At their numerical ranks factors are exact: inputs could only bring rounding in.
    by_data = options.rank.kind != "exact" and "data" not in options.without
    if feeding is None or feeding.fit is None or not by_data:
        return uncalibrated(prepared)
    samples = calibration_samples(sized_by or prepared, feeding.fit, options.limits)
    calibration = described(samples, feeding, options, fitted)
    return calibrate_as(prepared, fitted, samples, calibration, options.seed, cache, pool, progress)


def described(
    samples: Samples, feeding: Feeding, options: Options, fitted: Sequence[Layer]
) -> Calibration:
    """The samples that some layers are fitted to, as a plan names them."""
    return Calibration(
        str(options.data),
        feeding.share,
        samples.digest(),
        len(samples),
        options.batch,
        influence="sensitivity" not in options.without,
        layers=tuple(layer.name for layer in fitted),
    )


def uncalibrated(prepared: Prepared) -> Calibrated:
    """What factors depend on where they are fitted to the weights alone."""
    return Calibrated({}, None, key_of(prepared.source.digest))


def calibrate_as(
    prepared: Prepared,
    fitted: Sequence[Layer],
    samples: Samples,
    calibration: Calibration,
    seed: int,
    cache: Cache,
    pool: Pool,
    progress: Progress,
) -> Calibrated:
    """Moments of some layers' inputs on the samples of a calibration.

    The model runs on one CPU thread, so that a replay has the same to the bit.
    """
    key = key_of(
        prepared.source.digest, calibration.digest, seed, prepared.input_shapes, calibration.layers
    )
    statistics = read_statistics(cache, key, fitted)
    missing = [layer for layer in fitted if layer.name not in statistics]
    started = time.perf_counter()
    computed = calibrate(prepared, missing, samples, ONE_CPU_THREAD, seed, progress, pool)
    if computed:
        statistics |= computed
        write_statistics(cache, key, statistics, time.perf_counter() - started)
    if calibration.influence:
        # Errors of a layer's output count as far as later layers pass them on.
        metrics = influences(prepared)
        statistics = {
            name: replace(item, metric=metrics.get(name)) for name, item in statistics.items()
        }
    return Calibrated(statistics, calibration, key_of(key, calibration.influence))
