"""The ways in which a model goes through onnxlr, and what has to hold for the results.

Outputs come from plain sessions of ONNX Runtime, or from ONNX's reference implementation where the
runtime doesn't support an operator or an opset.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
from numpy.typing import NDArray

import onnxlr
from models.conformance.cases import Case, Feed, Material, constant_weights
from onnxlr.candidates.candidate import candidate
from onnxlr.candidates.fits import Fit, fit_method
from onnxlr.errors import one_line
from onnxlr.layers.layer import Layer
from onnxlr.methods.registry import find_pass, installed_passes
from onnxlr.model.load import load
from onnxlr.plan.plan import Decision, Plan, use
from onnxlr.prepare.prepared import prepare
from onnxlr.system.memo import Memo
from onnxlr.types import Rank

Outputs = list[list[Any]]
# By TensorProto's type of weights and outputs; the coarsest counts.
TOLERANCE = {
    onnx.TensorProto.FLOAT: 1e-4,
    onnx.TensorProto.DOUBLE: 1e-4,
    onnx.TensorProto.FLOAT16: 1e-2,
    onnx.TensorProto.BFLOAT16: 5e-2,
}
MAX_DROP = 0.01
REFUSED = (onnxlr.ModelError, onnxlr.DataError)


class BrokenError(Exception):
    """A result isn't what onnxlr promises."""


class Trial:
    """A model with its outputs, which those of every result are compared to.

    Attributes
    ----------
    weights : list of (name, operator)
        What the report has to mention.
    native : bool
        Whether ONNX Runtime runs the model.
    before : list of outputs or None
        For each feed; None where nothing runs it.
    """

    def __init__(self, case: Case, material: Material, folder: Path) -> None:
        self.feeds = material.feeds
        self.path, self.out = folder / "in.onnx", folder / "out.onnx"
        self.content = material.model.SerializeToString()
        self.path.write_bytes(self.content)
        self.weights = constant_weights(material.model)
        self.data = _write_data(material.feeds, folder / "data.npz")
        types = [t.data_type for t in material.model.graph.initializer]
        types += [v.type.tensor_type.elem_type for v in material.model.graph.output]
        self.tolerance = max((TOLERANCE[t] for t in types if t in TOLERANCE), default=1e-4)
        self.before: Outputs | None = None
        self._run: Callable[[bytes, Sequence[Feed]], Outputs] = _run_runtime
        try:
            self.before = _run_runtime(self.content, self.feeds)
        except Exception:  # then the reference has a try
            self._run = _run_reference
        self.native = self.before is not None
        # A convolution takes the reference minutes.
        if self.before is None and case.group != "light":
            try:
                self.before = _run_reference(self.content, self.feeds)
            except Exception:
                self.before = None
        self.repeats = self.before is not None and (
            gap(self.before, self._run(self.content, self.feeds)) == 0
        )
        self.expected = self._agreeing(material.expected)

    def _agreeing(self, expected: Sequence[Sequence[Any]]) -> Outputs | None:
        """Return the outputs that the test promises, or None if the original has others."""
        promised = [list(outputs) for outputs in expected]
        if not promised or self.before is None or not gap(promised, self.before) <= self.tolerance:
            return None
        return promised

    def judge(self, limit: float | None, label: str = "") -> None:
        """Check that the written model passes the checker, and has the outputs of the original.

        Without a limit only types and shapes have to agree.
        """
        written = self.out.read_bytes()
        if written == self.content:
            return
        try:
            onnx.checker.check_model(onnx.load_from_string(written), full_check=True)
        except Exception as error:  # shape inference raises other types
            raise BrokenError(f"{label}the checker says: {one_line(error)}") from None
        if self.before is None:
            return
        try:
            after = self._run(written, self.feeds)
        except Exception:
            if self.native:
                raise
            return  # the reference fails on some convolutions that every runtime runs
        for truth in (self.before, self.expected):
            distance = 0.0 if truth is None else gap(truth, after)
            if math.isinf(distance) or (
                limit is not None and self.repeats and not distance <= limit
            ):
                raise BrokenError(f"{label}outputs are off by {distance:.2e}, {limit} is allowed")

    def judge_drop(self) -> None:
        """Check that the written model loses no more than promised on the inputs that judged it."""
        if self.before is None or not self.repeats or self.data is None:
            return
        error = relative_error(self.before, self._run(self.out.read_bytes(), self.feeds))
        if not error <= MAX_DROP * 1.001:
            raise BrokenError(f"a relative error of {error:.4f}, {MAX_DROP} was promised")

    def mentioned(self, rows: Sequence[Decision]) -> None:
        """Check that the report has every weight of a heavy operator, with a reason if it stays."""
        # A folded BatchNormalization makes a new weight, named after the old.
        named = {row.weight.removesuffix("/batch_norm_folded") for row in rows}
        absent = [f"{name!r} of {op}" for name, op in self.weights if name not in named]
        if absent:
            raise BrokenError(f"not in the report: {', '.join(absent)}")
        if silent := [row.name for row in rows if not row.reason]:
            raise BrokenError(f"there is no reason for {', '.join(silent)}")

    def optimize(self, **options: Any) -> onnxlr.Result:
        """Optimize the model, and check that the same plan gives the same bytes."""
        self.out.unlink(missing_ok=True)
        result = onnxlr.optimize(self.path, self.out, measure=False, jobs=1, **options)
        self.mentioned(result.report.decisions)
        if result.plan.calibration is None:
            again = self.out.with_name("again.onnx")
            onnxlr.apply(result.plan, self.path, again)
            if again.read_bytes() != self.out.read_bytes():
                raise BrokenError("its plan gives other bytes")
        if not result.plan.replaced and self.out.read_bytes() != self.content:
            raise BrokenError("nothing was replaced, and the output isn't the input")
        return result


def at_full_rank(trial: Trial) -> tuple[int, int]:
    """Replace every layer by every method that takes it at full rank, whether that saves or not."""
    return _by_plan(trial, lambda fit, _: None if fit.graph_pass.fallback else fit.full)


def at_least_rank(trial: Trial) -> tuple[int, int]:
    """Replace them at the lowest rank, for weights that have no higher one."""
    return _by_plan(trial, lambda fit, layer: fit.graph_pass.ladder(layer)[0])


def _by_plan(trial: Trial, rank_of: Callable[[Fit, Layer], Rank | None]) -> tuple[int, int]:
    source = load(trial.path)
    layers = prepare(source, feed=None).layers
    replaced = 0
    for name in installed_passes():
        rows = []
        for layer in layers:
            fit = fit_method(layer, find_pass(name), Memo(4))
            rank = None if isinstance(fit, str) else rank_of(fit, layer)
            if rank is not None:
                item = candidate(layer, find_pass(name), rank, "params")
                rows.append(use(layer, item, "by plan", 0.0))
        if rows:
            onnxlr.apply(Plan(source.digest, tuple(rows)), trial.path, trial.out)
            trial.judge(trial.tolerance, f"{name} at rank {rows[0].rank}: ")
            replaced += len(rows)
    return replaced, len(layers)


def at_exact_rank(trial: Trial, *, expand: bool = False) -> tuple[int, int]:
    """Use ``--rank exact``, which writes what has no loss where it saves something."""
    # Unlike the runtime, the reference can't verify within optimize.
    verify = "full" if trial.native else "none"
    result = trial.optimize(rank="exact", expand_at_load=expand, verify=verify)
    trial.judge(trial.tolerance)
    return len(result.plan.replaced), len(result.plan.decisions)


def expanding(trial: Trial) -> tuple[int, int]:
    """Use ``--rank exact`` with ``--expand-at-load``, for weights of any operator."""
    return at_exact_rank(trial, expand=True)


def by_drop(trial: Trial) -> tuple[int, int]:
    """Find the fewest parameters that the drop allows on the inputs of the test."""
    data = trial.data
    result = trial.optimize(
        metric="rel-error",
        max_drop=MAX_DROP,
        target="params",
        data=data,
        validation=data,
    )
    trial.judge(None)
    trial.judge_drop()
    return len(result.plan.replaced), len(result.plan.decisions)


def at_planted_rank(trial: Trial) -> tuple[int, int]:
    """Use an eighth of the rank, for weights that have no more, by the fastest methods."""
    result = trial.optimize(rank="0.125", method=("svd", "channel-svd"))
    trial.judge(trial.tolerance)
    return len(result.plan.replaced), len(result.plan.decisions)


def at_half_rank(trial: Trial) -> tuple[int, int]:
    """Use half of the rank and verify nothing: the graph has to be right, and to run."""
    result = trial.optimize(rank="0.5", max_drop=1, verify="none")
    trial.judge(None)
    return len(result.plan.replaced), len(result.plan.decisions)


# Each returns the number of replaced layers, and that of all layers.
WAYS: dict[str, Callable[[Trial], tuple[int, int]]] = {
    "full": at_full_rank,
    "least": at_least_rank,
    "exact": at_exact_rank,
    "expand": expanding,
    "drop": by_drop,
    "half": at_half_rank,
    "planted": at_planted_rank,
}
# The others are only for weights that have a low rank.
ALWAYS = ("full", "exact", "expand", "drop", "half")


def _run_runtime(content: bytes, feeds: Sequence[Feed]) -> Outputs:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [session.run(None, dict(feed)) for feed in feeds]


def _run_reference(content: bytes, feeds: Sequence[Feed]) -> Outputs:
    with warnings.catch_warnings():  # of models that overflow on purpose
        warnings.simplefilter("ignore")
        session = onnx.reference.ReferenceEvaluator(onnx.load_from_string(content))
        return [list(session.run(None, dict(feed))) for feed in feeds]


def _write_data(feeds: Sequence[Feed], path: Path) -> Path | None:
    """Write the inputs of the test as samples; None if they aren't arrays of one shape."""
    stacks = {name: [feed[name] for feed in feeds] for name in (feeds or ({},))[0]}
    arrays = [array for stack in stacks.values() for array in stack]
    if not arrays or not all(isinstance(a, np.ndarray) and a.dtype.kind in "biuf" for a in arrays):
        return None
    if any(len({array.shape for array in stack}) > 1 for stack in stacks.values()):
        return None
    np.savez(path, **{n: np.stack(a) for n, a in stacks.items()})  # type: ignore[arg-type]
    return path


def gap(before: Outputs, after: Outputs) -> float:
    """Return the largest ‖a − b‖ / ‖a‖ of an output; infinite if types or shapes differ."""
    return max(
        (_apart(a, b) for one, two in zip(before, after, strict=True) for a, b in _pairs(one, two)),
        default=0.0,
    )


def _length(array: NDArray[np.float64]) -> float:
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(array))


def _pairs(before: Any, after: Any) -> Iterable[tuple[Any, Any]]:
    """Yield the pairs of arrays within two outputs, which may be sequences."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for a, b in zip(before, after, strict=True):
            yield from _pairs(a, b)
    else:
        yield before, after


def _apart(before: Any, after: Any) -> float:
    if before is None or after is None or isinstance(before, (list, dict)):
        return 0.0 if before is after or str(before) == str(after) else math.inf
    a, b = np.asarray(before), np.asarray(after)
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.dtype.kind not in "fV":  # ml_dtypes' kinds are V
        return 0.0 if np.array_equal(a, b) else math.inf
    x, y = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isnan(x), np.isnan(y)):
        return math.inf
    finite = np.isfinite(x) & np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return math.inf
    return _length(x[finite] - y[finite]) / max(_length(x[finite]), 1e-30)


def relative_error(before: Outputs, after: Outputs) -> float:
    """Return the largest ‖y − ŷ‖ / ‖y − ȳ‖ of an output of floats; ȳ is the mean over feeds."""
    worst = 0.0
    for i, first in enumerate(before[0]):
        if not isinstance(first, np.ndarray) or first.dtype.kind != "f":
            continue
        y, z = (np.stack([one[i].astype(np.float64) for one in some]) for some in (before, after))
        y, z = (np.nan_to_num(a, posinf=0.0, neginf=0.0) for a in (y, z))
        error = _length(y - z)
        worst = max(worst, error / _spread(y) if error else 0.0)
    return worst


def _spread(y: NDArray[np.float64]) -> float:
    """Return the norm around the mean over feeds, else around the overall mean, else the norm."""
    plain = _length(y)
    for centre in (y.mean(axis=0), y.mean()):
        around = _length(y - centre)
        if around > 1e-6 * plain:
            return around
    return plain or 1e-30
