"""The decisions for a model, one a layer, and the plan that replays them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from onnxlr.calibrate.calibration import Calibration
from onnxlr.candidates.candidate import Candidate
from onnxlr.errors import UsageError
from onnxlr.layers.kernel import kernel_of
from onnxlr.layers.layer import Layer
from onnxlr.methods.channels import INTERPOLATIVE
from onnxlr.methods.choice import Choice, plan_digest
from onnxlr.methods.registry import find_pass
from onnxlr.plan.width_plan import KEEP as KEEP
from onnxlr.plan.width_plan import WidthPlan
from onnxlr.types import Rank
from onnxlr.verify.layer_latency import LayerTime
from onnxlr.version import __version__


@dataclass(frozen=True)
class Alternative:
    """A candidate that was weighed for a layer, chosen or not, with its numbers.

    Attributes
    ----------
    method : str
    rank : tuple of int
    params : int
    macs : int or None
    error : float or None
        Predicted relative error of the layer's output on the calibration data; of its weight where
        its inputs weren't looked at; None where the rank was named, and nothing predicted.
    harm : float or None
        Predicted relative error of the model's outputs, with this layer alone replaced; None where
        sensitivity wasn't measured.
    before_ms, after_ms : float or None
        Of the layer alone and of what would replace it; None where they weren't timed.
    """

    method: str
    rank: Rank
    params: int
    macs: int | None
    error: float | None = None
    harm: float | None = None
    before_ms: float | None = None
    after_ms: float | None = None


@dataclass(frozen=True)
class Decision:
    """What happens to a layer, and why. One row of the report.

    Attributes
    ----------
    error : float or None
        Relative error of the weight by the factors as they are stored.
    output_error : float or None
        Relative error of the layer's output on the calibration data.
    before_ms, after_ms : float or None
        Of the layer alone and of what replaces it; None where they weren't timed.
    alternatives : tuple of Alternative
        All that was weighed for the layer, what was chosen among it.
    weight : str
        Name of the initializer.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    decision: str
    rank: Rank | None
    reason: str
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    error: float | None
    output_error: float | None = None
    before_ms: float | None = None
    after_ms: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    weight: str = ""


@dataclass(frozen=True)
class Plan:
    """The decisions for one model; the same plan on the same model gives the same bytes.

    Chains are on the layers as they are once widths are narrowed.
    """

    model: str
    decisions: tuple[Decision, ...]
    seed: int = 0
    calibration: Calibration | None = None
    widths: WidthPlan = field(default_factory=WidthPlan)

    @property
    def replaced(self) -> tuple[Decision, ...]:
        """The decisions that change a layer."""
        return tuple(d for d in self.decisions if d.decision != KEEP)

    @property
    def digest(self) -> str:
        """SHA-256 of what determines the bytes: the model, the samples, and each choice."""
        chosen = {d.name: (d.decision, d.rank) for d in self._chains}
        digest = self.calibration.digest if self.calibration is not None else ""
        return plan_digest(self.model, chosen, digest, self.widths.kept)

    @property
    def _chains(self) -> tuple[Decision, ...]:
        """The decisions that put a chain in the place of a layer."""
        return tuple(d for d in self.replaced if d.decision != INTERPOLATIVE.name)

    def choices(self) -> dict[str, Choice]:
        """The passes and ranks by layer name.

        Raises
        ------
        UsageError
            If a method isn't installed.
        """
        return {d.name: Choice(find_pass(d.decision), d.rank or ()) for d in self._chains}

    def named_as(self, layers: Sequence[Layer]) -> "Plan":
        """The same plan with the names that layers have now.

        Versions before named a layer after a node where the weight says more.
        """
        names = {layer.name for layer in layers}
        former = {use.node.name or "": layer.name for layer in layers for use in layer.uses[:1]}
        changed = {
            d.name: former[d.name]
            for d in self.decisions
            if d.name not in names and d.name in former
        }
        calibration = self.calibration
        if calibration is not None:
            called = tuple(changed.get(name, name) for name in calibration.layers)
            calibration = replace(calibration, layers=called)
        decisions = tuple(replace(d, name=changed.get(d.name, d.name)) for d in self.decisions)
        return replace(self, decisions=decisions, calibration=calibration)

    def to_json(self) -> str:
        """Readable, diffable JSON with a row a layer."""
        fitted = None if self.calibration is None else asdict(self.calibration)
        head: dict[str, Any] = {
            "onnxlr_version": __version__,
            "model": self.model,
            "seed": self.seed,
            "calibration": fitted,
        }
        if self.widths.decisions:
            head["widths"] = self.widths.to_dict()
        rows = ",\n".join(_written(d) for d in self.decisions)
        return json.dumps(head, indent=2)[:-2] + f',\n  "layers": [\n{rows}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, label: str = "the plan") -> "Plan":
        """Read what ``to_json`` wrote.

        Raises
        ------
        UsageError
            If it is no plan.
        """
        try:
            data = json.loads(text)
            decisions = tuple(_decision(row) for row in data["layers"])
            counts = Counter(d.name for d in decisions)
            if twice := next((n for n, count in counts.items() if count > 1), None):
                raise ValueError(f"it decides twice on {twice!r}")
            fitted = data.get("calibration")
            calibration = None if fitted is None else _calibration(fitted)
            seed = int(data.get("seed", 0))
            if not 0 <= seed < 2**64:
                raise ValueError(f"its seed is {seed}")
            widths = data.get("widths")  # older plans have none
            narrowed = WidthPlan() if widths is None else WidthPlan.from_dict(widths)
            return cls(str(data["model"]), decisions, seed, calibration, narrowed)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise UsageError(
                f"{label} is no onnxlr plan ({type(error).__name__}: {error}): write one with "
                "onnxlr optimize --plan-out"
            ) from None


def _written(decision: Decision) -> str:
    """A row a layer, and below it a row for each of the alternatives."""
    row = asdict(decision)
    others = ",\n".join("      " + json.dumps(other) for other in row.pop("alternatives"))
    return f"    {json.dumps(row)[:-1]}, " + (
        '"alternatives": []}' if not others else f'"alternatives": [\n{others}\n    ]}}'
    )


def _decision(row: Mapping[str, Any]) -> Decision:
    rank = row["rank"]
    others = (Alternative(**{**o, "rank": tuple(o["rank"])}) for o in row.get("alternatives", ()))
    fields = {
        **row,
        "shape": tuple(row["shape"]),
        "rank": None if rank is None else tuple(rank),
        "alternatives": tuple(others),
    }
    decision = Decision(**fields)
    named = all(isinstance(s, str) for s in (decision.name, decision.decision))
    ranked = decision.decision == KEEP or (
        decision.rank and all(type(r) is int and r > 0 for r in decision.rank)
    )
    if not named or not ranked:
        raise ValueError(f"the row of {decision.name!r} has no usable method and rank")
    return decision


def _calibration(fields: Mapping[str, Any]) -> Calibration:
    fields = dict(fields)
    if "half" in fields:  # plans that were written before the data had three parts
        fields["share"] = (1, 2) if fields.pop("half") else (1, 1)
    calibration = Calibration(**{**fields, "share": tuple(fields["share"])})
    share = calibration.share
    if len(share) != 2 or not all(type(n) is int for n in share) or not 0 < share[0] <= share[1]:
        raise TypeError(f"the calibration took {share!r} of the samples")
    named = isinstance(calibration.data, str) and isinstance(calibration.digest, str)
    if not named or type(calibration.samples) is not int or calibration.samples < 1:
        raise TypeError("the calibration names no samples")
    if type(calibration.batch) is not int or calibration.batch < 1:
        raise TypeError(f"the calibration ran {calibration.batch!r} samples at once")
    if type(calibration.sequential) is not int or calibration.sequential < 0:
        raise TypeError(f"the calibration is corrected on {calibration.sequential!r} samples")
    return replace(calibration, layers=tuple(map(str, calibration.layers)))


def keep(layer: Layer, reason: str, alternatives: tuple[Alternative, ...] = ()) -> Decision:
    """The decision to leave a layer as it is."""
    return Decision(
        layer.name,
        layer.op,
        layer.shape,
        KEEP,
        None,
        reason,
        layer.params,
        layer.params,
        layer.macs,
        layer.macs,
        None,
        alternatives=alternatives,
        weight=layer.weight.name or "",
    )


def use(
    layer: Layer,
    item: Candidate,
    reason: str,
    error: float | None,
    output_error: float | None = None,
    timed: LayerTime | None = None,
    alternatives: tuple[Alternative, ...] = (),
) -> Decision:
    """The decision to replace a layer.

    The error is that of the factors as they are stored; None where it wasn't looked at.
    """
    return Decision(
        layer.name,
        layer.op,
        layer.shape,
        item.choice.graph_pass.name,
        item.choice.rank,
        reason,
        layer.params,
        item.params,
        layer.macs,
        item.macs,
        error,
        output_error,
        None if timed is None else timed.before_ms,
        None if timed is None else timed.after_ms,
        alternatives,
        layer.weight.name or "",
    )


def with_fewer_channels(layer: Layer, now: Layer, decision: Decision) -> Decision:
    """The decision on a layer that was made with fewer channels around it.

    Parameters
    ----------
    layer, now : Layer
        As the original has it, and the model with fewer channels.
    decision : Decision
        On the latter.
    """
    if layer.shape == now.shape:
        return decision
    before, after = _sizes(layer), _sizes(now)
    words = ", ".join(
        f"{word} {a} → {b}"
        for word, a, b in zip(("inputs", "outputs"), before, after, strict=True)
        if a != b
    )
    kept = decision.decision == KEEP
    chain = "no chain beside that: " if decision.reason.startswith("put back") else ""
    return replace(
        decision,
        shape=layer.shape,
        decision=INTERPOLATIVE.name if kept else decision.decision,
        rank=after if kept else decision.rank,
        reason=f"{words}; {chain}{decision.reason}",
        params_before=layer.params,
        macs_before=layer.macs,
        error=None,
    )


def _sizes(layer: Layer) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    if layer.convolves:
        kernel = kernel_of(layer)
        return kernel.group * kernel.inputs, kernel.group * kernel.outputs
    first, second = layer.shape[-2:]
    return (second, first) if layer.uses[0].contracts_last else (first, second)
