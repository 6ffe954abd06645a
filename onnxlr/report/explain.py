"""What is said about a run: a decision with its reason for every layer, and the report."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from onnxlr.candidates.fits import Candidate
from onnxlr.decompose import parse_rank
from onnxlr.decompose.ranks import storage_precision
from onnxlr.layers.layer import Layer
from onnxlr.layers.macs import count_macs
from onnxlr.methods.base import WeightPass
from onnxlr.model.destinations import path_exists
from onnxlr.model.graph import DEFAULT_VALUES_IR, count_params
from onnxlr.options import Options
from onnxlr.plan.choose import Choosing, saved_macs
from onnxlr.plan.evaluate import Assessor
from onnxlr.plan.plan import Alternative, Decision, Plan, keep, use
from onnxlr.plan.search import Chosen
from onnxlr.prepare.feeding import Feeding
from onnxlr.prepare.prepared import Prepared
from onnxlr.report.report import Circumstances, LayerSpectrum, Report, Size
from onnxlr.rewrite.builder import Built
from onnxlr.system.cluster import Cluster
from onnxlr.system.session import runtime_version
from onnxlr.types import rank_text
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.latency import Comparison
from onnxlr.verify.latency_table import processor
from onnxlr.version import __version__

_NAMED = 5  # of them
_PACKAGES = ("numpy", "scipy", "onnx", "onnx-ir")


def _left(name: str) -> str:
    return (
        f"{name}, the external data of the file that was here before, is still there: delete it if "
        "no other model has it"
    )


@dataclass(frozen=True)
class Outcome:
    """What a run has come to."""

    assessor: Assessor
    choosing: Choosing
    chosen: Chosen
    quality: Quality | None
    speed: Comparison | None

    @property
    def prepared(self) -> Prepared:
        """The model that was worked on."""
        return self.assessor.prepared

    @property
    def options(self) -> Options:
        """What was asked for."""
        return self.assessor.options

    @property
    def feeding(self) -> Feeding | None:
        """What the model was run on."""
        return self.assessor.feeding

    def decisions(self) -> tuple[Decision, ...]:
        """A decision with its reason for every layer."""
        rows = []
        for layer in self.prepared.layers:
            item = self.chosen.get(layer.name)
            others = self._alternatives(layer)
            if item is None:
                reason = self.choosing.kept.get(layer.name) or self._outweighed(layer)
                rows.append(keep(layer, reason, others))
                continue
            error = self.assessor.factory.error(layer, item.choice)
            lost = self.assessor.factory.output_error(layer, item.choice)
            timed = self.choosing.times.get((layer.name, item.choice))
            rows.append(use(layer, item, self._why(layer, item), error, lost, timed, others))
        return tuple(rows)

    def report(
        self, plan: Plan, built: Built, out: str | None, seconds: float, old: Sequence[str] = ()
    ) -> Report:
        """All of it, with the verdict in a sentence."""
        source, decisions = self.prepared.source, plan.decisions
        before = Size(
            source.label,
            source.nbytes,
            count_params(source.model),
            count_macs(self.prepared.model, self.prepared.shapes),
        )
        after = Size(
            out,
            built.nbytes,
            built.params,
            before.macs - saved_macs(self.prepared, self.chosen),
        )
        replaced = len(plan.replaced)
        verdict = (
            f"{replaced} of {len(decisions)} layers replaced"
            if replaced
            else "no gain: the output equals the input"
        )
        shape = next(iter(self.prepared.input_shapes.values()), ())
        return Report(
            __version__,
            before,
            after,
            self.quality,
            self.speed,
            self.options.machine,
            shape[0] if shape else 1,
            decisions,
            verdict,
            self._judged_on(),
            seconds,
            (*self._notes(plan), *map(_left, old)),
            self._spectra() if self.options.report is not None else (),
            self._circumstances(plan),
        )

    def _judged_on(self) -> str:
        if self.options.verify == "layers":
            drawn = "inputs drawn at random" if self.feeding is None else self.feeding.description
            return f"each replaced layer alone, on {drawn}; the model wasn't judged as a whole"
        if self.feeding is None:
            return "not run (--verify none): only the graph was checked"
        return f"the saved file, in full, on {self.feeding.description}"

    def _notes(self, plan: Plan) -> list[str]:
        """What the user should know besides."""
        notes, speed, assessor = [], self.speed, self.assessor
        table = self.choosing.table
        if speed is not None and plan.replaced and speed.verdict == "slower":
            notes.append(
                f"slower than the original ({speed.speedup:.2f}×): the ranks or the target were "
                "named, so that latency vetoed nothing; --target latency puts such layers back"
            )
        if assessor.factory.corrects:
            notes.append(
                f"factors were corrected in sequence, each layer behind those before it, on "
                f"{assessor.samples} samples"
            )
        if assessor.too_many:
            notes.append(
                "factors were not corrected in sequence: with so many layers that would take "
                "longer than all the rest"
            )
        if assessor.judgements > 1:
            notes.append(f"{assessor.judgements} files were built, saved and judged to find this")
        if assessor.guarded:
            notes.append(
                (
                    "the labels say little: the original gets no more of them right than chance "
                    "would"
                    if self.quality is not None and self.quality.metric == "top1"
                    else "arg-max agreement says little on these inputs (synthetic, or all of one "
                    "class)"
                )
                + ": the outputs' rel-error was held to --max-drop too"
            )
        if assessor.judge is not None and not assessor.timed:
            notes.append(
                "nothing was timed: latencies come from "
                + (
                    "the named table, made on another machine, by another version of ONNX Runtime "
                    "or with other threads"
                    if table is not None and table.foreign
                    else "known tables, or are estimated from the work"
                )
            )
        named = self.options.latency_table
        if named is not None and not path_exists(Path(named)):
            notes.append(f"{named} was not written: no latency had to be known")
        if table is not None and table.estimated:
            notes.append(
                f"{table.estimated} latencies were in no table: they were estimated from "
                "multiply-accumulates, elements moved and operators started"
            )
        notes += self._lost_inputs(plan)
        pool = assessor.factory.pool
        notes += pool.notes
        if isinstance(pool.workers, Cluster):
            notes.append(pool.workers.summary())
        if self.options.without:
            notes.append(f"left out on request: {', '.join(self.options.without)}")
        return notes

    def _lost_inputs(self, plan: Plan) -> list[str]:
        model = self.prepared.source.model
        given = {value.name for value in model.graph.inputs if value.is_initializer()}
        gone = sorted({d.weight for d in plan.replaced if d.weight in given})
        if not gone or model.ir_version < DEFAULT_VALUES_IR:
            return []
        named = ", ".join(gone[:_NAMED]) + (", …" if len(gone) > _NAMED else "")
        return [
            f"{len(gone)} of the weights that were replaced could be given as inputs too, which is "
            f"over: {named}"
        ]

    def _alternatives(self, layer: Layer) -> tuple[Alternative, ...]:
        if self.choosing.weighing is not None:
            return self.choosing.weighing.alternatives(layer)
        rows = []
        for item in self.choosing.named.get(layer.name, ()):
            timed = self.choosing.times.get((layer.name, item.choice))
            rows.append(
                Alternative(
                    item.choice.graph_pass.name,
                    item.choice.rank,
                    item.params,
                    item.macs,
                    before_ms=None if timed is None else timed.before_ms,
                    after_ms=None if timed is None else timed.after_ms,
                )
            )
        return tuple(rows)

    def _outweighed(self, layer: Layer) -> str:
        """Why a layer that has candidates is left as it is."""
        weighing = self.choosing.weighing
        options = weighing.options.get(layer.name) if weighing is not None else None
        if weighing is None or not options:
            return "no method was chosen"
        choice = min(options, key=lambda o: o.damage).candidate.choice
        error = next(w.error for w in weighing.weighed[layer.name] if w.candidate.choice == choice)
        return (
            f"other layers save more for less: {choice.graph_pass.name} at rank "
            f"{rank_text(choice.rank)} alone would leave a rel. error of "
            f"{weighing.harm(layer.name, error):.3g}"
        )

    def _why(self, layer: Layer, item: Candidate) -> str:
        words = [item.note] if item.note else []
        timed = self.choosing.times.get((layer.name, item.choice))
        if timed is not None:
            words.append(
                f"alone {timed.before_ms:.3f} → {timed.after_ms:.3f} ms "
                f"({timed.before_ms / timed.after_ms:.2f}×)"
            )
        words.append(f"{item.params / layer.params:.0%} of the parameters")
        if isinstance(item.choice.graph_pass, WeightPass):
            words.append("multiplied back when the session loads")
        elif layer.macs and item.macs is not None:
            words.append(f"{item.macs / layer.macs:.0%} of the MACs")
        return ", ".join(words)

    def _spectra(self) -> tuple[LayerSpectrum, ...]:
        """Singular values that the chosen methods look at; of kept layers those of the first."""
        rule = parse_rank("evbmf")
        rows = []
        for layer in self.prepared.layers:
            fits = self.choosing.fits.get(layer.name, ())
            item = self.chosen.get(layer.name)
            chosen = None if item is None else item.choice
            fit = next((f for f in fits if chosen and f.graph_pass is chosen.graph_pass), None)
            fit = fit or next(iter(fits), None)
            if fit is None:
                continue
            precision = storage_precision(layer.dtype.numpy())
            for i, spectrum in enumerate(fit.spectra):
                values = np.asarray(spectrum.values, dtype=np.float64).max(axis=0)  # of all groups
                top = float(values.max(initial=0.0)) or 1.0
                followed = chosen is not None and chosen.graph_pass is fit.graph_pass
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
