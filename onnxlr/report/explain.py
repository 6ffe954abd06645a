"""What is said about a run: a decision with its reason for every layer, and the report."""

import platform
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from onnxlr.calibrate.stage import Calibrated
from onnxlr.calibrate.statistics import UNSEEN, weight_only_reason
from onnxlr.candidates.candidate import Candidate
from onnxlr.courses.beginning import Base
from onnxlr.courses.course import Courses
from onnxlr.courses.narrow import NarrowPath, planned_widths
from onnxlr.decompose import parse_rank
from onnxlr.decompose.ranks import storage_precision
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import count_macs
from onnxlr.model.constants import count_params
from onnxlr.model.place import unused_data_files
from onnxlr.options import Options
from onnxlr.plan.budget import saved_macs
from onnxlr.plan.combined import Combined
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.frontier import Point, frontier
from onnxlr.plan.plan import Decision, Plan, keep, use, with_fewer_channels
from onnxlr.plan.settle import Selection
from onnxlr.plan.width_plan import WidthPlan
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.report.notes import notes_of, unused_note
from onnxlr.report.report import Circumstances, LayerSpectrum, Part, Report, Size
from onnxlr.rewrite.builder import Built
from onnxlr.system.runtime import runtime_version
from onnxlr.types import ms_text
from onnxlr.verify.latency_file import processor
from onnxlr.verify.latency_table import LatencyTable
from onnxlr.version import __version__
from onnxlr.widths.find import Widths
from onnxlr.widths.narrowing import Narrowing

_PACKAGES = ("numpy", "scipy", "onnx", "onnx-ir")


@dataclass(frozen=True)
class Outcome:
    """What a run has come to, and all that led there.

    Attributes
    ----------
    courses : Courses
        The searches whose models were tested.
    table : LatencyTable or None
        None where nothing was run.
    selection : Selection
    built : Built
        The file that is handed over.
    widths : Widths
        Of the original.
    path : NarrowPath
        What became of them.
    combined : Combined or None
        Low rank beside the step of ``--behind``; None without it.
    """

    courses: Courses
    table: LatencyTable | None
    selection: Selection
    built: Built
    widths: Widths
    path: NarrowPath
    combined: Combined | None = None

    @property
    def original(self) -> Base:
        """What the search on the original began with."""
        return self.courses.bases[None]

    @property
    def course(self) -> Base:
        """What the search for these chains began with; that on the original if there are none."""
        narrowing = self.selection.variant.narrowing if self.selection.chosen else None
        return self.courses.bases[narrowing]

    @property
    def evaluator(self) -> Evaluator:
        """Who judged, and timed."""
        return self.course.evaluator

    @property
    def prepared(self) -> Prepared:
        """The original."""
        return self.evaluator.original

    @property
    def base(self) -> Prepared:
        """The model whose layers were replaced: the original, or one with fewer channels."""
        narrowing = self.selection.variant.narrowing
        return self.prepared if narrowing is None else narrowing.prepared

    @property
    def calibrated(self) -> Calibrated:
        """What the factors of that model's layers were fitted to."""
        return self.course.calibrated

    @property
    def options(self) -> Options:
        """What was asked for."""
        return self.original.evaluator.options

    @property
    def feeding(self) -> Feeding | None:
        """What the model was run on."""
        return self.evaluator.feeding

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """A decision with its reason for every layer."""
        now = {layer.name: layer for layer in self.base.layers}
        return tuple(
            with_fewer_channels(layer, now[layer.name], self._decision(now[layer.name]))
            for layer in self.prepared.layers
        )

    def _decision(self, layer: Layer) -> Decision:
        selection, name = self.selection, layer.name
        alternatives = selection.alternatives.get(name, ())
        item = selection.chosen.get(name)
        if item is None:
            return keep(layer, selection.reasons[name], alternatives)
        statistics = self.calibrated.statistics.get(name)
        return use(
            layer,
            item,
            self._why(layer, item),
            selection.variant.weight_error(layer),
            selection.variant.output_error(layer, statistics),
            selection.times.get(name),
            alternatives,
        )

    @cached_property
    def width_plan(self) -> WidthPlan:
        """A decision with its reason for every width."""
        return self._width_plan(self.selection.variant.narrowing)

    def _width_plan(self, narrowing: Narrowing | None) -> WidthPlan:
        calibration = self.original.calibrated.calibration
        layers = () if calibration is None else calibration.layers
        return planned_widths(self.widths, self.path, narrowing, layers)

    @cached_property
    def frontier(self) -> tuple[Point, ...]:
        """Every model that was judged."""
        proposals = self.courses.proposals
        return frontier(self.evaluator, proposals, self.selection, self.plan, self._width_plan)

    @cached_property
    def plan(self) -> Plan:
        """The plan that replays the run."""
        narrowing = self.selection.variant.narrowing
        changed = self.selection.variant.changes_anything
        calibration = self.calibrated.calibration if changed else None
        if calibration is not None and not calibration.layers and narrowing is None:
            calibration = None  # only widths were looked at
        if calibration is not None:
            calibration = replace(calibration, sequential=self.selection.variant.sequential)
        head = self.prepared.source.digest, self.decisions, self.options.seed
        return Plan(*head, calibration, self.width_plan)

    def report(self, out: Path | None, seconds: float) -> Report:
        """All of it, with the verdict in a sentence.

        Parameters
        ----------
        out : Path or None
            Where the model goes.
        seconds : float
            What the run took.
        """
        plan, source, selection = self.plan, self.prepared.source, self.selection
        before = Size(
            source.label,
            source.nbytes,
            count_params(source.model),
            count_macs(self.prepared.model, self.prepared.shapes),
        )
        after = Size(
            None if out is None else str(out),
            self.built.nbytes,
            self.built.params,
            count_macs(self.base.model, self.base.shapes) - saved_macs(self.base, selection.chosen),
        )
        replaced = len(plan.replaced)
        verdict = (
            f"{replaced} of {len(plan.decisions)} layers replaced{self._narrowed_words()}"
            if replaced
            else "no gain: the output equals the input"
        )
        shape = next(iter(self.prepared.input_shapes.values()), ())
        unused = [] if out is None else unused_data_files(self.built.path, out)
        return Report(
            __version__,
            before,
            after,
            selection.quality,
            selection.speed,
            self.options.machine,
            shape[0] if shape else 1,
            plan.decisions,
            verdict,
            self._judged_on(),
            seconds,
            (*notes_of(self.evaluator, selection, self.table, plan), *map(unused_note, unused)),
            self._spectra() if self.options.report is not None else (),
            self._circumstances(plan),
            selection.verdicts.promise,
            self._parts(),
            self.frontier,
            self.width_plan.decisions,
            self.combined,
        )

    def _narrowed_words(self) -> str:
        """How many widths are narrowed, as the end of a sentence."""
        count = len(self.width_plan.kept)
        return f", {count} widths narrowed" if count else ""

    def _parts(self) -> tuple[Part, ...]:
        """What each part of the samples was used for."""
        feeding = self.feeding
        if feeding is None or feeding.fit is None or not isinstance(feeding.choose, Samples):
            return ()
        fitted = 0 if self.calibrated.calibration is None else self.calibrated.calibration.samples
        parts = [
            Part("fit", len(feeding.fit), f"factors ({fitted:,} samples) and sensitivities"),
            Part("choose", len(feeding.choose), "search, sequential correction and putting back"),
        ]
        if feeding.test is not None:
            use_of_test = "testing the chosen models, from the mildest on, and nothing else"
            parts.append(Part("test", len(feeding.test), use_of_test))
        return tuple(parts)

    def _judged_on(self) -> str:
        if self.options.verify == "layers":
            drawn = "inputs drawn at random" if self.feeding is None else self.feeding.description
            return f"each replaced layer alone, on {drawn}; the model wasn't judged as a whole"
        if self.feeding is None:
            return "not run (--verify none): only the graph was checked"
        behind = self.options.behind
        file = "the saved file" if behind is None else f"what {behind} makes of the saved file"
        return f"{file}, in full, on {self.feeding.description}"

    def _why(self, layer: Layer, item: Candidate) -> str:
        """Why a layer is replaced as it is."""
        words = [item.note] if item.note else []
        time = self.selection.times.get(layer.name)
        if time is not None:
            words.append(
                f"alone {ms_text(time.before_ms)} → {ms_text(time.after_ms)} ms "
                f"({time.before_ms / time.after_ms:.2f}×)"
            )
            if (more := self.selection.more_ms.get(layer.name)) is not None:
                words.append(f"{ms_text(time.saved_ms - more)} ms saved within the model")
        words.append(f"{item.params / layer.params:.0%} of the parameters")
        if item.choice.graph_pass.at_load:
            words.append("multiplied back when the session loads")
        elif layer.macs and item.macs is not None:
            words.append(f"{item.macs / layer.macs:.0%} of the MACs")
        by_data = self.calibrated.calibration is not None and not item.choice.graph_pass.at_load
        if by_data and layer.name not in self.calibrated.statistics:
            words.append(weight_only_reason(layer) or UNSEEN)
        return ", ".join(words)

    def _spectra(self) -> tuple[LayerSpectrum, ...]:
        """Singular values that the chosen methods look at; of kept layers those of the first."""
        rule = parse_rank("evbmf")
        rows = []
        for layer in self.base.layers:
            fits = self.course.fits.by_layer.get(layer.name, ())
            item = self.selection.chosen.get(layer.name)
            chosen = None if item is None else item.choice
            # By name: a pass that comes from another process is another object.
            method = "" if chosen is None else chosen.graph_pass.name
            fit = next((f for f in fits if f.graph_pass.name == method), None)
            fit = fit or next(iter(fits), None)
            if fit is None:
                continue
            precision = storage_precision(layer.dtype.numpy())
            for i, spectrum in enumerate(fit.spectra):
                values = np.asarray(spectrum.values, dtype=np.float64).max(axis=0)  # of all groups
                top = float(values.max(initial=0.0)) or 1.0
                followed = fit.graph_pass.name == method
                rows.append(
                    LayerSpectrum(
                        layer.name,
                        fit.graph_pass.name,
                        i,
                        tuple((values / top).tolist()),
                        rule.select(spectrum.values, spectrum.m, spectrum.n, precision),
                        chosen.rank[i] if chosen is not None and followed else None,
                    )
                )
        return tuple(rows)

    def _circumstances(self, plan: Plan) -> Circumstances:
        versions = [("onnxlr", __version__), ("python", platform.python_version())]
        if self.options.verify != "none":
            versions.append(("onnxruntime", runtime_version()))
        versions += [(name, version(name)) for name in _PACKAGES]
        digests = [("model", self.prepared.source.digest)]
        if plan.calibration is not None:
            digests.append(("calibration samples", plan.calibration.digest))
        return Circumstances(
            self.options.command,
            tuple(versions),
            processor(),
            self._judged_on(),
            tuple(digests),
        )
