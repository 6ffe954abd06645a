"""What an error of one layer's output does to the model's outputs: measured, layer by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.fitting import GLANCE, fit_layer, output_error, rest_of
from onnxlr.errors import ModelError
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.cost import weight_error
from onnxlr.model.save import save
from onnxlr.prepare.prepared import Prepared
from onnxlr.rewrite.replace import rewrite
from onnxlr.system.files import scratch_folder
from onnxlr.system.session import Session
from onnxlr.verify.fidelity import Fidelity
from onnxlr.verify.judge import Judge

LEAST = 1e-7  # below this an error is rounding


@dataclass(frozen=True)
class Sensitivity:
    """How a layer's relative output error shows in the model's outputs, from one error or several.

    Between the errors that were measured, the ratio of what comes out to what goes in changes
    evenly on a logarithmic scale; beyond them it stays.

    Attributes
    ----------
    errors : tuple of float
        Relative errors of the layer's output, rising; of its weight, where its inputs weren't
        looked at.
    harms : tuple of float
        Relative errors of the model's outputs with only this layer replaced.
    losses : tuple of float
        What adds up over the layers: squared harms, or divergences of the class probabilities.
    beyond : float
        From this error on, the outputs weren't finite.
    """

    errors: tuple[float, ...] = (1.0,)
    harms: tuple[float, ...] = (1.0,)
    losses: tuple[float, ...] = (1.0,)
    beyond: float = math.inf

    def harm(self, error: float) -> float:
        """Relative error of the model's outputs for an error of this layer's."""
        return self._scaled(error, np.array(self.harms), 1)

    def loss(self, error: float) -> float:
        """What this error adds to the loss of the whole."""
        return self._scaled(error, np.array(self.losses), 2)

    def _scaled(self, error: float, measured: np.ndarray[Any, Any], power: int) -> float:
        if error >= self.beyond:
            return math.inf
        at = np.log(np.array(self.errors))
        ratios = np.log(np.maximum(measured, 1e-300)) - power * at
        ratio = np.interp(math.log(max(error, LEAST)), at, ratios)
        return error**power * math.exp(float(ratio))

    @classmethod
    def from_probes(cls, rows: Sequence[Mapping[str, Any]], *, by_classes: bool) -> "Sensitivity":
        """Sensitivity from what ``probe`` gave; ``by_classes`` counts divergences."""
        finite = {max(r["error"], LEAST): r for r in rows if r["harm"] is not None}
        beyond = min((r["error"] for r in rows if r["harm"] is None), default=math.inf)
        if not finite:
            return cls(beyond=0.0)
        errors = sorted(finite)
        return cls(
            tuple(errors),
            tuple(finite[e]["harm"] for e in errors),
            tuple(
                finite[e]["divergence"] if by_classes else finite[e]["harm"] ** 2 for e in errors
            ),
            beyond,
        )


def probe(
    prepared: Prepared,
    judge: Judge,
    folder: Path,
    name: str,
    choice: Choice,
    statistics: Statistics | None,
) -> dict[str, Any]:
    """What one layer's replacement does to the model.

    Parameters
    ----------
    prepared : Prepared
    judge : Judge
    folder : Path
        Where the model is written for a moment, if it is here.
    name : str
    choice : Choice
    statistics : Statistics or None

    Returns
    -------
    dict
        ``error``: relative, of the layer's output or, without statistics, of its weight; ``harm``:
        relative error of the model's outputs, None if it isn't finite; ``divergence``: of its class
        probabilities, if it has some. Or ``refusal``: why there is no such model.
    """
    layer = prepared.layer(name)
    graph_pass, rank = choice.graph_pass, choice.rank
    try:
        # What an error does is the same whether or not a longer fit would make it smaller.
        factored = fit_layer(prepared, name, choice, statistics, GLANCE)
        fidelity = fidelity_of(prepared, {name: choice}, {name: factored}, judge, folder)
    except ModelError as refusal:
        return {"refusal": str(refusal)}
    if statistics is None or graph_pass.at_load:
        error = weight_error(layer, graph_pass, rank, factored.factors)
    else:
        rest = rest_of(graph_pass, layer, rank, factored.factors)
        error = output_error(layer, rest, statistics)
    harm = fidelity.rel_error if math.isfinite(fidelity.rel_error) else None
    return {"error": error, "harm": harm, "divergence": fidelity.divergence}


def is_probe(row: object) -> bool:
    """Whether a row, as it may come from a file, is what ``probe`` gives."""
    if not isinstance(row, dict):
        return False
    if "refusal" in row:
        return isinstance(row["refusal"], str)
    if not {"error", "harm", "divergence"} <= row.keys():
        return False
    numbers = [row["error"], *(row[n] for n in ("harm", "divergence") if row[n] is not None)]
    return all(isinstance(x, float | int) and 0 <= x < math.inf for x in numbers)


def fidelity_of(
    prepared: Prepared,
    choices: Mapping[str, Choice],
    factors: Mapping[str, Factored],
    judge: Judge,
    folder: Path,
) -> Fidelity:
    """How close the model's outputs stay with these layers replaced.

    Raises
    ------
    ModelError
        If there is no such model.
    """
    model = rewrite(prepared.model, prepared.shapes, choices, factors)
    here = folder if folder.is_dir() else None  # else this is a worker on another machine
    with scratch_folder(here, "probe-") as place:
        path = place / "probe.onnx"
        save(model, path, outside=bool(prepared.source.external))
        session = Session(path, judge.machine, "the optimized model")
        return judge.judge(session).fidelity
