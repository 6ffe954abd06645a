"""What a run found and decided, as data: the JSON of the contract."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from onnxlr.plan.plan import KEEP, Decision
from onnxlr.system.session import Machine
from onnxlr.types import Rank
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.latency import Comparison


@dataclass(frozen=True)
class Size:
    """A model's weight: bytes of its files, weight elements, and multiply-accumulates a run."""

    path: str | None
    bytes: int
    params: int
    macs: int


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one unfolding of a layer's weight, with the ranks that were found on it.

    Attributes
    ----------
    layer, method : str
    component : int
        Which number of the method's rank it decides.
    values : tuple of float
        As shares of the largest, falling.
    evbmf : int
        Rank above the noise.
    chosen : int or None
        None where the layer is kept.
    """

    layer: str
    method: str
    component: int
    values: tuple[float, ...]
    evbmf: int
    chosen: int | None


@dataclass(frozen=True)
class Circumstances:
    """What a run can be repeated from: the command, versions, machine and data.

    Attributes
    ----------
    command : str
        As it was typed, or the Python call.
    versions : tuple of (str, str)
        Package and version.
    processor : str
    data : str
        What judged, in words.
    digests : tuple of (str, str)
        SHA-256 of the model and of the samples.
    """

    command: str
    versions: tuple[tuple[str, str], ...]
    processor: str
    data: str
    digests: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Report:
    """Everything that is said about a run.

    Attributes
    ----------
    verdict : str
        One sentence: what came out, or why nothing did.
    quality, speed : or None
        None where ``--verify none`` asked not to run the model.
    batch : int
    verified : str
        What verification was done, and on what.
    notes : tuple of str
        What the user should know besides.
    spectra : tuple of LayerSpectrum
        Of the replaced layers and of those that were weighed; empty unless they were asked for.
    circumstances : Circumstances or None
    """

    version: str
    input: Size
    output: Size
    quality: Quality | None
    speed: Comparison | None
    machine: Machine
    batch: int
    decisions: tuple[Decision, ...]
    verdict: str
    verified: str
    seconds: float
    notes: tuple[str, ...] = ()
    spectra: tuple[LayerSpectrum, ...] = ()
    circumstances: Circumstances | None = None

    @property
    def theoretical_speedup(self) -> float:
        """Ratio of the multiply-accumulates."""
        return self.input.macs / self.output.macs if self.output.macs else 1.0

    @property
    def replaced(self) -> tuple[Decision, ...]:
        """The decisions that change a layer."""
        return tuple(d for d in self.decisions if d.decision != KEEP)

    def methods(self) -> Counter[str]:
        """How many layers each method replaces."""
        return Counter(d.decision for d in self.replaced)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of the contract."""
        quality, speed = self.quality, self.speed
        return {
            "onnxlr_version": self.version,
            "verdict": self.verdict,
            "input": vars(self.input),
            "output": vars(self.output),
            "metric": None
            if quality is None
            else {
                "name": quality.metric,
                "original": quality.original,
                "optimized": quality.optimized,
            },
            "fidelity": None if quality is None else vars(quality.fidelity),
            "speed": {
                "provider": self.machine.provider,
                "threads": self.machine.threads,
                "batch": self.batch,
                "original_ms": None if speed is None else speed.a.median_ms,
                "optimized_ms": None if speed is None else speed.b.median_ms,
                "speedup": None if speed is None else speed.speedup,
                "speedup_interval": None if speed is None else [speed.low, speed.high],
                "verdict": None if speed is None else speed.verdict,
                "theoretical_speedup": self.theoretical_speedup,
            },
            "verified": self.verified,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "layers": [decision_row(d) for d in self.decisions],
        }


def decision_row(decision: Decision) -> dict[str, Any]:
    """A decision as a row of the contract."""
    row = dict(vars(decision))
    row["rank"] = None if decision.rank is None else rank_value(decision.rank)
    row["shape"] = list(decision.shape)
    row["alternatives"] = [
        vars(other) | {"rank": rank_value(other.rank)} for other in decision.alternatives
    ]
    return row


def rank_value(rank: Rank) -> int | list[int]:
    """A rank in JSON: a number where it is one, else a list."""
    return rank[0] if len(rank) == 1 else list(rank)


def json_text(content: Any) -> str:
    """What ``--json`` writes, with null where JSON has no word for infinity or NaN."""
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def finite(content: Any) -> Any:
    """The same structure with None where JSON has no word for infinity or NaN."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
