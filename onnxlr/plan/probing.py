"""Sensitivities of all layers, measured side by side and cached."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxlr.candidates.candidate import Candidate
from onnxlr.methods.choice import Choice
from onnxlr.plan.sensitivity import LEAST, Sensitivity, is_probe, probe
from onnxlr.progress import Progress
from onnxlr.rewrite.factorizer import Factorizer
from onnxlr.system.cache import key_of
from onnxlr.system.files import scratch_folder
from onnxlr.verify.judge import Judge

_MODELS = 6  # of the model's size, that a process takes which runs it beside another


def statistics_key(factorizer: Factorizer) -> list[tuple[str, bool]]:
    """Which layers have statistics, and which of those a metric: errors depend on it."""
    return [(n, s.metric is not None) for n, s in sorted(factorizer.statistics.items())]


def measure_sensitivities(
    candidates: Mapping[str, Sequence[Candidate]],
    errors: Sequence[float],
    by_classes: bool,
    factorizer: Factorizer,
    judge: Judge,
    origin: str,
    progress: Progress,
) -> dict[str, Sensitivity | str]:
    """What errors of each layer do to the model, or why none can be made.

    Parameters
    ----------
    candidates : mapping of str to sequence of Candidate
        With their errors, by layer name; one or more for each.
    errors : sequence of float
        Those at which sensitivity is measured; with none, an error counts the same everywhere.
    by_classes : bool
        Whether divergences of the class probabilities count, instead of the outputs' errors.
    factorizer : Factorizer
    judge : Judge
    origin : str
        Digest of the model and the samples.
    progress : Progress
    """
    probed = {name: _probes_of(rows, errors) for name, rows in candidates.items()}
    if not errors:
        return dict.fromkeys(probed, Sensitivity())
    with progress.stage("measure sensitivities", len(probed)) as step:
        rows = _probe_all(probed, factorizer, judge, origin, step)
    sensitivities: dict[str, Sensitivity | str] = {}
    for name, choices in probed.items():
        layer_rows = [rows[_label(name, choice)] for choice in choices]
        measured = [row for row in layer_rows if "refusal" not in row]
        sensitivities[name] = (
            Sensitivity.from_probes(measured, by_classes=by_classes)
            if measured
            else layer_rows[0]["refusal"]
        )
    return sensitivities


def _probe_all(
    probed: Mapping[str, Sequence[Choice]],
    factorizer: Factorizer,
    judge: Judge,
    origin: str,
    step: Any,
) -> dict[str, Any]:
    """A row for each choice of each layer, by label: those that the cache has, and the others."""
    cache, prepared = factorizer.cache, factorizer.prepared
    key = key_of(origin, statistics_key(factorizer))
    rows = cache.read("sensitivities", key)
    missing = [
        (name, choice)
        for name, choices in probed.items()
        for choice in choices
        if not is_probe(rows.get(_label(name, choice)))
    ]
    left = {name: sum(n == name for n, _ in missing) for name in probed}
    with scratch_folder(factorizer.scratch, "probes-") as folder:
        items = [(name, choice, factorizer.statistics.get(name)) for name, choice in missing]
        needs = _MODELS * prepared.source.nbytes
        results = factorizer.pool.map(probe, items, prepared, judge, folder, needs=needs)
        for (name, choice), row in zip(missing, results, strict=True):
            rows[_label(name, choice)] = row
            cache.write("sensitivities", key, rows)
            left[name] -= 1
            if not left[name]:
                step(name)
    return rows


def _label(name: str, choice: Choice) -> str:
    ranks = "-".join(map(str, choice.rank))
    return f"{name} {choice.graph_pass.name} {ranks}"


def _probes_of(candidates: Sequence[Candidate], errors: Sequence[float]) -> list[Choice]:
    """The candidates that sensitivity is measured with: those nearest to some errors."""
    nearest = [
        min(candidates, key=lambda c: abs(math.log(max(c.error**2, LEAST**2) / error**2)))
        for error in errors
    ]
    return list(dict.fromkeys(item.choice for item in nearest))
