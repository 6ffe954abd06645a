"""The decisions for widths, one each, and what replays them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from onnxlr.methods.channels import INTERPOLATIVE
from onnxlr.types import Shape
from onnxlr.widths.find import Width
from onnxlr.widths.narrow import Kept

KEEP = "keep"  # the decision to leave something as it is


@dataclass(frozen=True)
class WidthDecision:
    """What happens to a width, and why.

    Attributes
    ----------
    name : str
    size : int
        How many channels it has.
    decision : str
        ``interpolative`` or ``keep``.
    kept : tuple of int or None
        The channels that stay; None for all.
    reason : str
    writers, readers, carriers : tuple of str
        Layers and nodes that write, read and carry it.
    error : float or None
        Predicted relative error of what is read; None where it stays, and where nothing is known.
    """

    name: str
    size: int
    decision: str
    kept: tuple[int, ...] | None
    reason: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    carriers: tuple[str, ...]
    error: float | None = None


@dataclass(frozen=True)
class WidthPlan:
    """How widths are narrowed.

    Attributes
    ----------
    decisions : tuple of WidthDecision
    sequential : int
        How many samples the readers were corrected on in sequence; 0 where each was fitted by
        itself.
    layers : tuple of str
        Those whose inputs were looked at together in the original; of other readers only the
        channels were.
    inputs : mapping of str to tuple of int
        The shapes of the model's inputs that the widths were found for.
    """

    decisions: tuple[WidthDecision, ...] = ()
    sequential: int = 0
    layers: tuple[str, ...] = ()
    inputs: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def kept(self) -> Kept:
        """The channels that stay, by the names of the widths that are narrowed."""
        return {d.name: d.kept for d in self.decisions if d.kept is not None}

    def to_dict(self) -> dict[str, Any]:
        """What a plan's file holds of it."""
        inputs = {name: list(shape) for name, shape in self.inputs.items()}
        head = {"sequential": self.sequential, "layers": list(self.layers), "inputs": inputs}
        return head | {"rows": [asdict(d) for d in self.decisions]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "WidthPlan":
        """Read what ``to_dict`` gave.

        Raises
        ------
        ValueError, TypeError, KeyError
            If it is something else.
        """
        decisions = tuple(_decision(row) for row in data["rows"])
        counts = Counter(d.name for d in decisions)
        if twice := next((n for n, count in counts.items() if count > 1), None):
            raise ValueError(f"it decides twice on the width {twice!r}")
        sequential = data["sequential"]
        if type(sequential) is not int or sequential < 0:
            raise TypeError(f"widths are corrected on {sequential!r} samples")
        layers = tuple(map(str, data["layers"]))
        inputs = {str(k): _shape(v) for k, v in data.get("inputs", {}).items()}  # older: none
        return cls(decisions, sequential, layers, inputs)


def _shape(sizes: Sequence[Any]) -> Shape:
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{sizes!r} is no shape of an input")
    return tuple(sizes)


def _decision(row: Mapping[str, Any]) -> WidthDecision:
    lists = {key: tuple(map(str, row[key])) for key in ("writers", "readers", "carriers")}
    kept = row["kept"]
    if kept is not None:
        kept, size = tuple(kept), row["size"]
        rising = all(type(k) is int for k in kept) and sorted(set(kept)) == list(kept)
        if not kept or not rising or kept[0] < 0 or kept[-1] >= size:
            raise ValueError(f"the width {row['name']!r} keeps channels that it can't have")
    return WidthDecision(**{**row, **lists, "kept": kept})


def width_decision(
    width: Width, kept: tuple[int, ...] | None, reason: str, error: float | None = None
) -> WidthDecision:
    """The decision on a width."""
    return WidthDecision(
        width.name,
        width.size,
        KEEP if kept is None else INTERPOLATIVE.name,
        kept,
        reason,
        width.writers,
        width.readers,
        width.carriers,
        error,
    )
