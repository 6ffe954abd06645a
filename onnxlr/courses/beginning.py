"""What a search begins with: methods, moments and models, on the original or fewer channels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnxlr.calibrate.budget import calibration_samples
from onnxlr.calibrate.stage import Calibrated, calibrate_layers, described
from onnxlr.candidates.fits import Fits, fit_all
from onnxlr.candidates.spectra import decompose
from onnxlr.courses.narrow import NarrowPath, narrow_path
from onnxlr.layers.macs import count_macs
from onnxlr.layers.select import name_filter
from onnxlr.methods.base import GraphPass
from onnxlr.methods.channels import names_channels
from onnxlr.model.constants import count_params
from onnxlr.options import Options
from onnxlr.plan.evaluate import Evaluator
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Progress
from onnxlr.rewrite.factorizer import Factorizer
from onnxlr.rewrite.variant import Variant
from onnxlr.system.cache import Cache
from onnxlr.system.pool import Pool
from onnxlr.verify.confidence import GRADED
from onnxlr.verify.examination import Examination
from onnxlr.widths.find import Widths, no_widths
from onnxlr.widths.narrowing import Narrower, Narrowing, moments_for, widths_of


@dataclass(frozen=True, eq=False)
class Base:
    """A model whose layers may become chains, with what methods make of them."""

    evaluator: Evaluator
    fits: Fits
    calibrated: Calibrated


def takes_channels(options: Options) -> bool:
    """Whether widths are narrowed: where it is named, or with data and nothing else asked for."""
    if names_channels(options.methods):
        return True
    unasked = "auto" in options.methods and options.rank.kind == "auto"
    fitted = options.data is not None and options.verify == "full"
    return unasked and fitted and not {"data", "widths"} & set(options.without)


def share_left(evaluator: Evaluator, narrowing: Narrowing) -> float:
    """What a model with fewer channels has of the original, in the unit of the target."""
    goal, before, after = evaluator.options.goal, evaluator.original, narrowing.prepared
    if goal == "latency":
        if not evaluator.timed:
            return 1.0
        variant = Variant({}, {}, 0, narrowing)
        speed = evaluator.compare(variant)
        return 1 / speed.speedup
    if goal == "macs":
        return count_macs(after.model, after.shapes) / count_macs(before.model, before.shapes)
    if goal == "bytes":
        return after.source.nbytes / before.source.nbytes
    return count_params(after.source.model) / count_params(before.source.model)


@dataclass(frozen=True)
class Beginning:
    """What a search begins with, on the original and on models with fewer channels."""

    options: Options
    passes: Sequence[GraphPass]
    feeding: Feeding | None
    scratch: Path
    pool: Pool
    cache: Cache
    progress: Progress

    def fit(self, prepared: Prepared) -> Fits:
        """The methods that fit each layer, with the spectra that the rank asks for."""
        excluded = name_filter(self.options.include, self.options.exclude)
        fits = fit_all(prepared.layers, self.passes, excluded)
        if not self.options.rank.needs_spectrum or not self.passes:
            return fits
        with self.progress.stage("decompose", len(fits.by_layer)) as step:
            return decompose(prepared, fits, self.pool, self.cache, step)

    def widths(self, prepared: Prepared, examination: Examination | None) -> Widths:
        """The widths that may be narrowed, as far as the user means them."""
        options = self.options
        if not takes_channels(options):
            return no_widths()
        few = self._few_samples(examination)
        excluded = name_filter(options.include, options.exclude)
        reasons = {layer.name: few or excluded(layer) for layer in prepared.layers}
        return widths_of(prepared).without({n: why for n, why in reasons.items() if why})

    def _few_samples(self, examination: Examination | None) -> str | None:
        """Why the samples can't choose channels; None if they can, or channels are asked for."""
        if self.feeding is None or names_channels(self.options.methods):
            return None
        limits, kind = self.options.limits, examination and examination.judge.kind
        count = len(self.feeding.choose)
        least = limits.width_graded_least if kind in GRADED else limits.width_samples_least
        if count >= least:
            return None
        return (
            f"{count} samples choose, {least} would be needed to tell which channels stay; "
            "--method interpolative tries it all the same"
        )

    def calibrate(self, prepared: Prepared, fits: Fits, readers: Sequence[str] = ()) -> Calibrated:
        """Moments of the inputs of all that is fitted."""
        fitted = {layer.name for layer in fits.layers(prepared.layers)} | set(readers)
        layers = [layer for layer in prepared.layers if layer.name in fitted]
        calibrated = calibrate_layers(prepared, layers, self.feeding, *self._means())
        samples = self._samples(prepared)
        if not readers or calibrated.calibration is not None or samples is None:
            return calibrated
        # Factors at their numerical ranks need no samples; which channels are redundant, they tell.
        assert self.feeding is not None
        return replace(calibrated, calibration=described(samples, self.feeding, self.options, ()))

    def _samples(self, prepared: Prepared) -> Samples | None:
        """The samples that all that is fitted is fitted to."""
        feeding, options = self.feeding, self.options
        if feeding is None or feeding.fit is None or "data" in options.without:
            return None
        return calibration_samples(prepared, feeding.fit, options.limits)

    def narrow(self, original: Base, widths: Widths) -> NarrowPath:
        """Acceptable models with fewer channels."""
        if not widths.usable:
            return NarrowPath(reasons={w.name: w.refusal for w in widths.rows if w.refusal})
        evaluator, calibrated = original.evaluator, original.calibrated
        prepared, feeding, options = evaluator.original, self.feeding, self.options
        samples, statistics = self._samples(prepared), calibrated.statistics
        narrower = Narrower(
            *(prepared, widths, statistics),
            moments_for(prepared, statistics, samples, options.seed),
            self.scratch,
            "" if calibrated.calibration is None else calibrated.calibration.digest,
            *(None if feeding is None else feeding.first_feed, options.machine),
            *(options.shapes, options.batch),
        )
        return narrow_path(evaluator, narrower)

    def narrowed(self, original: Base, narrowing: Narrowing) -> Base:
        """What a search for chains on fewer channels begins with."""
        prepared, evaluator = narrowing.prepared, original.evaluator
        fits = self.fit(prepared)
        fitted = fits.layers(prepared.layers)
        calibrated = calibrate_layers(
            *(prepared, fitted, self.feeding, *self._means()), sized_by=narrowing.origin
        )
        factorizer = Factorizer(
            prepared,
            self.scratch,
            calibrated.statistics,
            self.pool,
            self.cache,
            calibrated.origin,
            narrowing,
        )
        calibration, options = calibrated.calibration, self.options
        if options.fraction is not None and options.goal != "latency":
            left = share_left(evaluator, narrowing)
            options = replace(options, fraction=min(1.0, options.fraction / left))
        return Base(
            replace(
                evaluator,
                prepared=prepared,
                factorizer=factorizer,
                calibration=calibration,
                options=options,
            ),
            fits,
            calibrated,
        )

    def _means(self) -> tuple[Options, Cache, Pool, Progress]:
        return self.options, self.cache, self.pool, self.progress
