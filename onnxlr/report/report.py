"""The report of a run as data, and its JSON."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from onnxlr.plan.combined import Combined
from onnxlr.plan.frontier import Point
from onnxlr.plan.plan import KEEP, Decision
from onnxlr.plan.width_plan import WidthDecision
from onnxlr.system.session import Machine
from onnxlr.types import Rank
from onnxlr.verify.defaults import MetricChoice
from onnxlr.verify.fidelity import Quality
from onnxlr.verify.latency import Comparison
from onnxlr.verify.promise import Promise


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes
    ----------
    path : str or None
        The file, or what messages call the model; None for one that wasn't written.
    bytes : int
        Bytes of its files, external data included.
    params : int
        Number of elements of its weights.
    macs : int
        Multiply-accumulates of one run.
    """

    path: str | None
    bytes: int
    params: int
    macs: int


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one unfolding of a layer's weight, with its ranks.

    Attributes
    ----------
    layer, method : str
    component : int
        Index of the number that this unfolding decides in the method's rank.
    values : tuple of float
        The singular values as shares of the largest, in falling order.
    evbmf : int
        The rank that stands out of the noise.
    chosen : int or None
        The chosen rank; None where the layer is left as it is.
    """

    layer: str
    method: str
    component: int
    values: tuple[float, ...]
    evbmf: int
    chosen: int | None


@dataclass(frozen=True)
class Circumstances:
    """What somebody needs to repeat a run: the command, the versions, the machine and the data.

    Attributes
    ----------
    command : str
        The command line that asks for the same run.
    versions : tuple of (str, str)
        Packages with their versions.
    processor : str
        The model of the processor.
    data : str
        The samples or inputs that judged, in words.
    digests : tuple of (str, str)
        Names with their SHA-256: the model's, and that of the samples.
    """

    command: str
    versions: tuple[tuple[str, str], ...]
    processor: str
    data: str
    digests: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Part:
    """A part of the user's samples: its name, how many there are, and what they were used for."""

    name: str
    samples: int
    used_for: str


@dataclass(frozen=True)
class Report:
    """Everything that there is to say about a run, by the names of the JSON too.

    ``report["speed"]["speedup"]`` is what ``--json`` writes there.

    Attributes
    ----------
    verdict : str
        One sentence: how many layers are replaced, or why none is.
    quality : Quality or None
        None where the model as a whole wasn't run.
    speed : Comparison or None
        None where the model as a whole wasn't timed.
    batch : int
        Number of samples in the timed batch.
    verified : str
        How the result was verified, and on what.
    seconds : float
        How long the run took.
    notes : tuple of str
        What the user should know besides.
    spectra : tuple of LayerSpectrum
        The spectra of the replaced layers and of those with candidates; only an HTML report needs
        them, without one there are none.
    circumstances : Circumstances or None
        None where they weren't recorded.
    promise : Promise or None
        What was to be shown of the loss; None where the model as a whole wasn't run.
    parts : tuple of Part
        What each part of the samples was used for; empty without samples.
    frontier : tuple of Point
        Every model that was judged.
    widths : tuple of WidthDecision
        Every width, and why; empty where none was looked for.
    behind : Combined or None
        Low rank, the step of ``--behind``, both or neither; None without ``--behind``. Where
        something is, the quality, the speed and the frontier are those of the file behind that.
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
    promise: Promise | None = None
    parts: tuple[Part, ...] = ()
    frontier: tuple[Point, ...] = ()
    widths: tuple[WidthDecision, ...] = ()
    behind: Combined | None = None

    def __getitem__(self, name: str) -> Any:
        """A part of the report, as ``--json`` writes it."""
        return self.to_dict()[name]

    @property
    def choice(self) -> str:
        """Which metric was chosen, and why; empty where the user named it, or nothing is judged."""
        return "" if self.promise is None else self.promise.choice_line

    @property
    def claim(self) -> str:
        """What was shown of the loss, in a sentence; empty where no model was judged as a whole."""
        return "" if self.promise is None else self.promise.claim(self.quality)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the true loss, each at the promised confidence; None where they aren't known."""
        if self.promise is None or self.quality is None:
            return None
        return self.promise.interval(self.quality)

    @property
    def loss_words(self) -> str:
        """What was lost, and between which ends that is at the promised confidence."""
        if self.promise is None or self.quality is None:
            return ""
        return self.promise.words(self.quality)

    @property
    def theoretical_speedup(self) -> float:
        """The ratio of the multiply-accumulates; 1 where the output has none."""
        return self.input.macs / self.output.macs if self.output.macs else 1.0

    @property
    def replaced(self) -> tuple[Decision, ...]:
        """The decisions that change a layer."""
        return tuple(d for d in self.decisions if d.decision != KEEP)

    def methods(self) -> Counter[str]:
        """The number of layers that each method replaces."""
        return Counter(d.decision for d in self.replaced)

    def to_dict(self) -> dict[str, Any]:
        """The report as ``--json`` writes it, before infinities are replaced."""
        quality, speed = self.quality, self.speed
        return {
            "onnxlr_version": self.version,
            "verdict": self.verdict,
            "input": vars(self.input),
            "output": vars(self.output),
            "metric": None
            if quality is None
            else {
                **metric_row(quality, None if self.promise is None else self.promise.choice),
                **self._promise_dict(quality),
            },
            "parts": {p.name: {"samples": p.samples, "used_for": p.used_for} for p in self.parts},
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
                "settled": None if speed is None else speed.settled,
                "busy": None if speed is None else speed.busy,
                "theoretical_speedup": self.theoretical_speedup,
            },
            "behind": None if self.behind is None else behind_dict(self.behind),
            "verified": self.verified,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "frontier": [point_row(point) for point in self.frontier],
            "layers": [decision_row(d) for d in self.decisions],
            "widths": [width_row(d) for d in self.widths],
        }

    def _promise_dict(self, quality: Quality) -> dict[str, Any]:
        """What the JSON says of the loss beside the values of the metric."""
        promise = self.promise
        if promise is None:
            return {}
        return {
            "loss": quality.drop,
            "interval": None if self.interval is None else list(self.interval),
            "limit": promise.limit,
            "confidence": promise.confidence if promise.tested else None,
            "samples": promise.samples,
            "tested": promise.tested,
            "claim": self.claim,
        }


def metric_row(quality: Quality, metric: MetricChoice | None) -> dict[str, Any]:
    """The metric as ``--json`` writes it: both values, and why it was chosen."""
    return {
        "name": quality.metric,
        "original": quality.original,
        "optimized": quality.optimized,
        "chosen_because": None if metric is None else metric.because,
    }


def decision_row(decision: Decision) -> dict[str, Any]:
    """A decision as a row of ``layers`` in the JSON."""
    row = dict(vars(decision))
    row["rank"] = None if decision.rank is None else rank_value(decision.rank)
    row["shape"] = list(decision.shape)
    row["alternatives"] = [
        vars(other) | {"rank": rank_value(other.rank)} for other in decision.alternatives
    ]
    return row


def width_row(decision: WidthDecision) -> dict[str, Any]:
    """A decision on a width as a row of ``widths`` in the JSON."""
    kept = None if decision.kept is None else list(decision.kept)
    lists = {key: list(getattr(decision, key)) for key in ("writers", "readers", "carriers")}
    return {**vars(decision), **lists, "kept": kept}


def where_words(machine: Machine, batch: int) -> str:
    """Where a model was timed, in words."""
    return f"{machine.provider}, {machine.threads} thread(s), batch {batch}"


def behind_dict(combined: Combined) -> dict[str, Any]:
    """Low rank and the step of ``--behind``, as ``behind`` in the JSON."""
    rows = [
        {
            **{key: getattr(row, key) for key in ("what", "loss", "ms", "speedup", "bytes")},
            "interval": None if row.interval is None else list(row.interval),
            "within_limit": not row.why_not,
        }
        for row in combined.rows
    ]
    return {"name": combined.name, "rows": rows, "verdict": combined.verdict}


def point_row(point: Point) -> dict[str, Any]:
    """A model that was judged as a row of ``frontier`` in the JSON."""
    row = dict(vars(point))
    del row["plan"], row["file_name"]
    return row | {"plan": point.file_name}


def rank_value(rank: Rank) -> int | list[int]:
    """A rank in JSON: a number if it has one component, else a list."""
    return rank[0] if len(rank) == 1 else list(rank)


def json_text(content: Any) -> str:
    """The text that ``--json`` writes, with null where JSON has no word for infinity or NaN."""
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def finite(content: Any) -> Any:
    """The same structure with None where JSON has no word for infinity or NaN."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
