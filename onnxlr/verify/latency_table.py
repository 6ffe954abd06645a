"""Milliseconds of layers and of what would replace them: measured once a machine, and kept."""

import contextlib
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxlr.errors import UsageError
from onnxlr.layers.layer import Layer, Use
from onnxlr.limits import USUAL, Limits
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import chain_work, layer_work
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.files import path_exists, read_json, write_json
from onnxlr.system.session import Machine, runtime_version
from onnxlr.verify import layer_latency
from onnxlr.verify.layer_latency import CRASHED, LayerTime, signature

# Of more ranks of one method than this for one layer, every second is measured.
_MEASURED = 4
# Of ranks, and of a time: beyond that a table is none.
_RANK, _LONGEST_MS = r"[1-9][0-9]{0,7}(,[1-9][0-9]{0,7})*", 1e9


_Ranks = dict[str, list[float] | None]  # the fields of a time by rank; None: it can't be run


class LatencyTable:
    """Times by signature of a layer's use, method and rank; what isn't there is measured.

    Between two measured ranks of a method times are interpolated over the multiply-accumulates.
    Where nothing may be measured and the table has nothing, they are estimated from the work.

    Parameters
    ----------
    machine : Machine
    path : Path, optional
        JSON file that is read now, and written by ``save``.
    measures : bool
        Whether it may measure; a table of another machine never does.
    limits : Limits
        How long one comparison takes.
    """

    def __init__(
        self,
        machine: Machine,
        path: Path | None = None,
        *,
        measures: bool = True,
        limits: Limits = USUAL,
    ) -> None:
        self.machine = machine
        self._path = path
        content = read_json(path) if path is not None else {}
        content = content if _is_table(content) else {}  # a damaged one is begun anew
        self.origin: dict[str, Any] = content.get("machine") or describe(machine)
        self.foreign = self.origin != describe(machine)
        self.measures = measures and not self.foreign
        self.estimated = 0  # times that were neither in the table nor measured
        self._limits = limits
        self._changed = False
        self._entries: dict[str, dict[str, _Ranks]] = content.get("times", {})

    def time(self, model: ir.Model, layer: Layer, choice: Choice) -> LayerTime | None:
        """Time of a choice for a layer; None where shapes are unknown or the runtime refuses it."""
        parts = [self._time(model, layer, use, choice) for use in layer.uses]
        times = [p for p in parts if p is not None]
        if len(times) < len(parts):
            return None
        if CRASHED in times:
            return CRASHED
        return LayerTime(
            sum(t.before_ms for t in times),
            sum(t.after_ms for t in times),
            sum(t.at_most_ms for t in times),
        )

    def times(
        self, model: ir.Model, layer: Layer, choices: Sequence[Choice]
    ) -> dict[Choice, LayerTime | None]:
        """Times of many choices: of each method the ends and every second rank are measured."""
        times: dict[Choice, LayerTime | None] = {}
        by_method: dict[str, list[Choice]] = {}
        for choice in choices:
            by_method.setdefault(choice.graph_pass.name, []).append(choice)
        for group in by_method.values():
            works = {c: _macs(layer, c) for c in group}
            group.sort(key=lambda c: (works[c], c.rank))
            step = 2 if len(group) > _MEASURED else 1
            ends = [group[i] for i in sorted({*range(0, len(group), step), len(group) - 1})]
            times |= {c: self.time(model, layer, c) for c in ends}
            anchors = [(works[c], t) for c in ends if (t := times[c]) not in (None, CRASHED)]
            for choice in group:
                if choice not in times:
                    times[choice] = _between(anchors, works[choice])
        return times

    def save(self) -> None:
        """Write the file, if there is one and something is new; what other runs added stays.

        Raises
        ------
        OSError
            If it can't be written.
        """
        if self._path is None or not self._changed:
            return
        self._merge(read_json(self._path))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"machine": self.origin, "unit": "ms", "times": self._entries})
        self._changed = False

    def _merge(self, content: dict[str, Any]) -> None:
        """Add the times that are in the file by now and not here."""
        if not _is_table(content) or content["machine"] != self.origin:
            return
        for use, methods in content["times"].items():
            for method, ranks in methods.items():
                entries = self._entries.setdefault(use, {}).setdefault(method, {})
                entries |= {rank: times for rank, times in ranks.items() if rank not in entries}

    def _time(self, model: ir.Model, layer: Layer, use: Use, choice: Choice) -> LayerTime | None:
        if use.x_shape is None or use.y_shape is None:
            return None
        ranks = self._entries.setdefault(signature(layer, use), {}).setdefault(
            choice.graph_pass.name, {}
        )
        rank = ",".join(map(str, choice.rank))
        if rank not in ranks:
            if not self.measures:
                return self._unmeasured(layer, use, choice, ranks)
            measured = layer_latency.measure(model, layer, use, choice, self.machine, self._limits)
            if measured is CRASHED:  # not a time: the next run shall see for itself
                return CRASHED
            self._changed = True
            ranks[rank] = None if measured is None else [round(ms, 6) for ms in measured.row]
        times = ranks[rank]  # as it is written: a run that reads the table sees the same
        return None if times is None else _time_of(times)

    def _unmeasured(
        self, layer: Layer, use: Use, choice: Choice, ranks: _Ranks
    ) -> LayerTime | None:
        """Interpolated from the ranks that the table has, else estimated from the work."""
        alone = replace(layer, uses=(use,))
        measured = {_rank(text): times for text, times in ranks.items() if times is not None}
        anchors = sorted(
            (
                (_macs(alone, Choice(choice.graph_pass, rank)), _time_of(times))
                for rank, times in measured.items()
                if choice.graph_pass.misfit(alone, rank) is None  # a file may say what it likes
            ),
            key=lambda anchor: (anchor[0], anchor[1].row),
        )
        if anchors:
            return _between(anchors, _macs(alone, choice))
        if choice.graph_pass.at_load:
            return None
        before, after = layer_work(alone), chain_work(alone, choice.graph_pass, choice.rank)
        if before is None or after is None:
            return None
        self.estimated += 1
        return LayerTime(before.usual_ms, after.usual_ms, after.usual_ms)


def machine_table(
    machine: Machine, cache: Cache, *, measures: bool = True, limits: Limits = USUAL
) -> LatencyTable:
    """The table that runs on this machine, runtime, provider and threads share."""
    return LatencyTable(
        machine, cache.path("latency", key_of(describe(machine))), measures=measures, limits=limits
    )


def named_table(
    machine: Machine, path: Path, *, measures: bool = True, limits: Limits = USUAL
) -> LatencyTable:
    """The table of a file, of this machine or another; a file that isn't there is begun.

    Raises
    ------
    UsageError
        If the file is there and holds no such table.
    """
    if path_exists(path):
        content = read_json(path) if path.is_file() else {}
        if not _is_table(content):
            raise UsageError(
                f"{path} is no latency table: a run with --latency-table on the machine that "
                "counts writes one where there is none yet"
            )
    return LatencyTable(machine, path, measures=measures, limits=limits)


def describe(machine: Machine) -> dict[str, Any]:
    """What a time depends on besides the layer, as it stands in a table."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "onnxruntime": runtime_version(),
        "provider": machine.provider,
        "threads": machine.threads,
    }


def processor() -> str:
    """The processor's name as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _is_table(content: dict[str, Any]) -> bool:
    times = content.get("times")
    return (
        isinstance(content.get("machine"), dict)
        and isinstance(times, dict)
        and all(
            isinstance(ranks, dict)
            and all(_is_rank(rank) and _is_time(ms) for rank, ms in ranks.items())
            for methods in times.values()
            if isinstance(methods, dict)
            for ranks in methods.values()
        )
        and all(isinstance(methods, dict) for methods in times.values())
    )


def _is_rank(text: str) -> bool:
    return re.fullmatch(_RANK, text) is not None


def _is_time(ms: object) -> bool:
    return ms is None or (
        isinstance(ms, list)
        and len(ms) == 3
        and all(isinstance(m, (int, float)) and 0 < m < _LONGEST_MS for m in ms)
    )


def _rank(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _time_of(times: list[float]) -> LayerTime:
    before, after, most = times
    return LayerTime(before, after, most)


def _macs(layer: Layer, choice: Choice) -> int:
    if choice.graph_pass.at_load:
        return 0
    work = chain_work(layer, choice.graph_pass, choice.rank)
    return 0 if work is None else work.macs


def _between(anchors: Sequence[tuple[int, LayerTime]], macs: int) -> LayerTime | None:
    """Interpolated over the work; outside of what was measured in proportion to it.

    Shares are what is interpolated: a layer and its replacement were timed in turn, so that what
    disturbed the one disturbed the other.
    """
    if not anchors:
        return None
    places = [work for work, _ in anchors]
    before = float(np.median([t.before_ms for _, t in anchors]))
    inside = float(np.clip(macs, places[0], places[-1]))
    beyond = macs / inside if inside else 1.0
    after, most = (
        float(np.interp(inside, places, shares)) * beyond * before
        for shares in (
            [t.after_ms / t.before_ms for _, t in anchors],
            [t.at_most_ms / t.before_ms for _, t in anchors],
        )
    )
    return LayerTime(before, after, most)
