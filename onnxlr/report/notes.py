"""What the user should know besides the figures: notes on the judgement, the times and the file."""

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from onnxlr.layers.find import fed_weights
from onnxlr.layers.layer import Layer
from onnxlr.layers.operators import QUANTIZED
from onnxlr.model.graph import DEFAULT_VALUES_IR
from onnxlr.plan.evaluate import Evaluator
from onnxlr.plan.plan import Plan
from onnxlr.plan.settle import Selection
from onnxlr.system.cluster import Cluster
from onnxlr.system.files import path_exists
from onnxlr.verify.examination import doubts_of
from onnxlr.verify.latency_table import LatencyTable

_NAMED = 5  # weights that a note names; the others are counted


def notes_of(
    evaluator: Evaluator, selection: Selection, table: LatencyTable | None, plan: Plan
) -> list[str]:
    """All notes on a run, the most important first."""
    notes, speed = [], selection.speed
    if evaluator.feeding is not None:
        doubts = doubts_of(evaluator.feeding, evaluator.judge)
        notes += [f"warning: {doubt}" for doubt in doubts]
    if speed is not None and plan.replaced and speed.verdict == "slower":
        notes.append(
            f"slower than the original ({speed.speedup:.2f}×): the ranks or the target were "
            "named, so that latency vetoed nothing; --target latency puts such layers back"
        )
    if (behind := evaluator.finish) is not None:
        notes.append(
            f"quality, times and the frontier are those of the files that {behind.name} makes; the "
            "output is the file before that step, and single layers were timed as they are in it"
        )
    notes += _refused_note(evaluator, selection)
    notes += _few_note(evaluator, selection)
    notes += _judgement_notes(evaluator, selection)
    notes += _opening_note(evaluator)
    notes += _timing_notes(evaluator, table)
    notes += _lost_inputs(evaluator, plan)
    notes += fed_note(evaluator.prepared.model)
    notes += quantized_note(evaluator.prepared.layers)
    pool = evaluator.factorizer.pool
    notes += pool.notes
    if isinstance(pool.workers, Cluster):
        notes.append(pool.workers.summary())
    if evaluator.time.left_out:
        notes.append(
            f"--time-limit {evaluator.options.time_limit:g} left no time for: "
            f"{'; '.join(evaluator.time.left_out)}"
        )
    if evaluator.options.without:
        notes.append(f"left out on request: {', '.join(evaluator.options.without)}")
    return notes


def _refused_note(evaluator: Evaluator, selection: Selection) -> list[str]:
    """What stands between this result and the next bolder model."""
    refused, promise = selection.refused, selection.verdicts.promise
    if refused is None or promise is None:
        return []
    variant = refused.rung.variant
    speed = evaluator.speed_of(variant)
    name = "the next bolder model" if speed is None else f"the {speed.speedup:.1f}× model"
    needed = promise.needed(refused.quality)
    if not promise.tested or not refused.quality.losses:
        return [f"{name} was not handed over: {refused.why}"]
    words = f"{name} {promise.lost(refused.quality.drop)} on the test samples"
    if needed is None:
        return [f"{words}, which isn't below the limit of {promise.limit_text}"]
    return [
        f"{words}; about {needed:,} samples would be needed to show that it is within "
        f"{promise.limit_text}"
    ]


def _few_note(evaluator: Evaluator, selection: Selection) -> list[str]:
    """How many samples to give for the usual confidence, where there are too few."""
    promise, options = selection.verdicts.promise, evaluator.options
    if promise is None or not promise.lowered or options.data is None:
        return []
    words = f"{promise.enough():,} in --validation"
    if options.validation is None:
        words = f"{2 * promise.enough():,} in --data, of which half test,"
    return [f"{promise.confidence:.0%} confidence is little: {words} would do for 95%"]


def _judgement_notes(evaluator: Evaluator, selection: Selection) -> list[str]:
    """How the set that is handed over was corrected and judged."""
    notes = []
    if evaluator.judge is not None and evaluator.judge.random_line:
        notes.append(evaluator.judge.random_line)
    if selection.variant.sequential:
        notes.append(
            f"factors were corrected in sequence, each layer fitted to what those before it give, "
            f"on {selection.variant.sequential} samples"
        )
    if evaluator.too_many_layers and len(selection.chosen) > 1:
        notes.append(
            "factors were not corrected in sequence: with so many layers that would take "
            "longer than all the rest"
        )
    if len(evaluator.judged) > 1:
        notes.append(f"{len(evaluator.judged)} files were built, saved and judged to find this")
    return notes


def _opening_note(evaluator: Evaluator) -> list[str]:
    """What a provider that compiles took for the original."""
    session, machine = evaluator.session, evaluator.options.machine
    if session is None or not machine.compiles:
        return []
    return [
        f"{machine.provider} took {session.opening_seconds:.2g} s to open the original, which it "
        "may compile"
    ]


def _timing_notes(evaluator: Evaluator, table: LatencyTable | None) -> list[str]:
    """Where latencies come from, if they weren't all measured here and now, and what is open."""
    notes = []
    if evaluator.judge is not None and not evaluator.timed:
        notes.append(
            "nothing was timed: latencies come from "
            + (
                "the named table, made on another machine, by another version of ONNX Runtime "
                "or with other threads"
                if table is not None and table.foreign
                else "known tables, or are estimated from the work"
            )
        )
    path = evaluator.options.latency_table
    if path is not None and not path_exists(Path(path)):
        notes.append(f"{path} was not written: no latency was needed")
    if table is None:
        return notes
    if table.estimated:
        notes.append(
            f"{table.estimated} latencies were never measured: they were estimated from "
            "multiply-accumulates, elements moved and operators started"
        )
    if table.stale:
        notes.append(table.stale)
    if (line := table.log.line(evaluator.speeds)) is not None:
        notes.append(line + _afterwards(table.doubtful, path))
    return notes


def _afterwards(doubtful: int, path: str | Path | None) -> str:
    """What becomes of latencies that were timed on a busy machine, as the end of a sentence."""
    if not doubtful:
        return ""
    if path is None:
        return f"; {doubtful} latencies of this run are not kept for later runs"
    return f"; {doubtful} latencies of this run are in {path}: --remeasure takes them anew"


def _lost_inputs(evaluator: Evaluator, plan: Plan) -> list[str]:
    """That weights which a caller could feed are gone."""
    model = evaluator.original.source.model
    inputs = {value.name for value in model.graph.inputs if value.is_initializer()}
    lost = sorted({d.weight for d in plan.replaced if d.weight in inputs})
    if not lost or model.ir_version < DEFAULT_VALUES_IR:
        return []
    named = ", ".join(lost[:_NAMED]) + (", …" if len(lost) > _NAMED else "")
    return [
        f"{len(lost)} of the replaced weights could be set as inputs of the model, and can't any "
        f"more: {named}"
    ]


def fed_note(model: ir.Model) -> list[str]:
    """That weights aren't in the file, so that nothing can be made of them."""
    if not (fed := fed_weights(model)):
        return []
    named = ", ".join(fed[:_NAMED]) + (", …" if len(fed) > _NAMED else "")
    return [
        f"{len(fed)} inputs are used as weights, but have no value in the file: {named}; "
        "export the model with its weights (export_params=True) to have them replaced"
    ]


def quantized_note(layers: Iterable[Layer]) -> list[str]:
    """That weights are integers already, and in which order both can be had."""
    count = sum(layer.dtype in QUANTIZED and layer.refusal is not None for layer in layers)
    if not count:
        return []
    return [
        f"{count} weight{'s are' if count > 1 else ' is'} quantized already and left alone: start "
        "from the model before that, and quantize what is written (--behind int8-dynamic judges "
        "and times both together)"
    ]


def unused_note(name: str) -> str:
    """That external data stay which no model that is known here has."""
    return (
        f"{name}, the external data of the file that was here before, is still there: delete it if "
        "no other model has it"
    )
