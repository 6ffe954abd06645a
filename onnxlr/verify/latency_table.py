"""Milliseconds of layers and of what would replace them: measured once a machine, and kept."""

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
from onnxlr.system.session import Machine
from onnxlr.types import ms_text, rank_text
from onnxlr.verify import layer_latency
from onnxlr.verify.latency_file import (
    Key,
    Ranks,
    Times,
    describe,
    is_table,
    parse_rank,
    ranks_of,
)
from onnxlr.verify.layer_latency import CRASHED, LayerTime, signature
from onnxlr.verify.rounds import BUSY
from onnxlr.verify.timing_log import TimingLog

# Of more ranks of one method than this for one layer, every second is measured.
_MEASURED = 4
# A fresh time contradicts a kept one if the replacement's share of the layer's time is another by
# this factor, or the layer's own time is by the second: neighbours on the same core make all of it
# take twice as long, and the clock rate changes too.
_SHARES, _SPEEDS = 1.2, 3.0
_PROBES, _TRIES = 2, 4  # layers that are probed until so many told something


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
    guarded : bool
        Whether the file only gets what settled on a machine that wasn't busy, and is probed before
        it is used. A file that isn't says what its run used: the same plan follows from it.
    remeasure : bool
        Whether all times that are asked for are measured anew, and replace those in the file.
    limits : Limits
        How long one comparison takes.

    Attributes
    ----------
    origin : dict
        The machine that the times are of.
    foreign : bool
        Whether that is another one.
    estimated : int
        Times that were neither in the table nor measured.
    log : TimingLog
        What was measured.
    stale : str
        Why the file's times are measured anew; empty if they aren't.
    """

    def __init__(
        self,
        machine: Machine,
        path: Path | None = None,
        *,
        measures: bool = True,
        guarded: bool = False,
        remeasure: bool = False,
        limits: Limits = USUAL,
    ) -> None:
        self.machine = machine
        self._path = path
        content = read_json(path) if path is not None else {}
        content = content if is_table(content) else {}  # a damaged one is begun anew
        self.origin: dict[str, Any] = content.get("machine") or describe(machine)
        self.foreign = self.origin != describe(machine)
        self.measures = measures and not self.foreign
        self.estimated, self.log, self.stale = 0, TimingLog(), ""
        self._guarded, self._limits = guarded, limits
        self._changed = False
        self._renewed = remeasure  # what the file has of a layer that is asked for doesn't count
        self._entries: Times = {} if remeasure else content.get("times", {})
        self._fresh: dict[Key, LayerTime | None] = {}  # measured by this run
        self._probed: dict[str, bool] = {}  # signatures, and whether the probe told something

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
            *_doubts(times),
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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        times = self._kept(read_json(self._path))
        write_json(self._path, {"machine": self.origin, "unit": "ms", "times": times})
        self._changed = False

    def _kept(self, content: dict[str, Any]) -> Times:
        """The times to be written, with those that are in the file by now and not here."""
        times: Times = {}
        if is_table(content) and content["machine"] == self.origin:
            times = content["times"]
        if self._renewed:
            times = {use: methods for use, methods in times.items() if use not in self._entries}
        for key, time in self._fresh.items():
            if self._is_worth_keeping(time):
                ranks_of(times, key)[key[2]] = None if time is None else time.row
        return times

    @property
    def doubtful(self) -> int:
        """Times that were measured on a busy machine, or didn't settle."""
        return sum(not self._is_sound(time) for time in self._fresh.values())

    def _is_worth_keeping(self, time: LayerTime | None) -> bool:
        return self._is_sound(time) or not self._guarded

    def _is_sound(self, time: LayerTime | None) -> bool:
        """Whether a time settled, on a machine that wasn't busy; that there is none always does."""
        alone = time is None or (time.busy <= BUSY and not self.log.crowded)
        return time is None or (time is not CRASHED and time.settled and alone)

    def _time(self, model: ir.Model, layer: Layer, use: Use, choice: Choice) -> LayerTime | None:
        if not use.sized:
            return None
        key = signature(layer, use), *layer_latency.choice_words(layer, choice)
        self._probe(model, layer, use, choice, key)
        ranks = ranks_of(self._entries, key)
        if key[2] not in ranks:
            if not self.measures:
                return self._unmeasured(layer, use, choice, ranks)
            measured = layer_latency.measure(model, layer, use, choice, self.machine, self._limits)
            if measured is CRASHED:  # not a time: the next run shall see for itself
                return CRASHED
            if measured is not None:
                self.log.add(layer.name, measured)
            self._enter(key, measured)
        times = ranks[key[2]]
        return self._fresh.get(key) or (None if times is None else _time_of(times))

    def _enter(self, key: Key, time: LayerTime | None) -> None:
        """Add a time that was measured, as it is written: who reads the table sees the same."""
        ranks_of(self._entries, key)[key[2]] = None if time is None else time.row
        self._fresh[key] = None if time is None else time.rounded()
        self._changed |= self._is_worth_keeping(time)

    def _probe(self, model: ir.Model, layer: Layer, use: Use, choice: Choice, key: Key) -> None:
        """Time a row of the file anew, for one or two layers; if it has changed, forget the file.

        What is measured on a busy machine, or doesn't settle, contradicts nothing.
        """
        row = ranks_of(self._entries, key).get(key[2])
        enough = sum(self._probed.values()) == _PROBES or len(self._probed) == _TRIES
        if row is None or not (self._guarded and self.measures) or self._renewed or enough:
            return
        if key in self._fresh or key[0] in self._probed:
            return
        time = layer_latency.measure(model, layer, use, choice, self.machine, self._limits)
        self._probed[key[0]] = time is not None and self._is_sound(time)
        if time is None or time is CRASHED:
            return
        self.log.waits.append(time.busy)
        if not self._is_sound(time) or _agree(time, _time_of(row)):
            return
        self.stale = (
            f"latencies that earlier runs had left no longer hold ({layer.name} by "
            f"{choice.graph_pass.name} at rank {rank_text(choice.rank)} took {ms_text(row[1])} of "
            f"{ms_text(row[0])} ms, and takes {ms_text(time.after_ms)} of "
            f"{ms_text(time.before_ms)} ms): they were measured anew"
        )
        self._entries, self._renewed = {}, True
        for known, fresh in (self._fresh | {key: time}).items():
            self._enter(known, fresh)

    def _unmeasured(self, layer: Layer, use: Use, choice: Choice, ranks: Ranks) -> LayerTime | None:
        """Interpolated from the ranks that the table has, else estimated from the work."""
        alone = replace(layer, uses=(use,))
        measured = {parse_rank(text): times for text, times in ranks.items() if times is not None}
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
    machine: Machine,
    cache: Cache,
    *,
    measures: bool = True,
    remeasure: bool = False,
    limits: Limits = USUAL,
) -> LatencyTable:
    """The table that runs on this machine, runtime, provider and threads share."""
    # Tables that were kept before timings had to settle have another key.
    path = cache.path("latency", key_of(describe(machine), "settled"))
    return LatencyTable(
        machine, path, measures=measures, guarded=True, remeasure=remeasure, limits=limits
    )


def named_table(
    machine: Machine,
    path: Path,
    *,
    measures: bool = True,
    remeasure: bool = False,
    limits: Limits = USUAL,
) -> LatencyTable:
    """The table of a file, of this machine or another; a file that isn't there is begun.

    Raises
    ------
    UsageError
        If the file is there and holds no such table, or is to be measured anew and another
        machine's.
    """
    if path_exists(path):
        content = read_json(path) if path.is_file() else {}
        if not is_table(content):
            raise UsageError(
                f"{path} is no latency table: a run with --latency-table on the machine that "
                "counts writes one where there is none yet"
            )
    table = LatencyTable(machine, path, measures=measures, remeasure=remeasure, limits=limits)
    if remeasure and table.foreign:
        raise UsageError(
            f"{path} is of another machine, version of ONNX Runtime, provider or number of "
            "threads, which --remeasure can't measure: name another file, or leave one out"
        )
    return table


def _time_of(times: list[float]) -> LayerTime:
    before, after, most = times
    return LayerTime(before, after, most)


def _doubts(times: Sequence[LayerTime]) -> tuple[bool, float]:
    """Whether all of them settled, and how busy the machine was at worst."""
    return all(t.settled for t in times), max(t.busy for t in times)


def _agree(fresh: LayerTime, kept: LayerTime) -> bool:
    """Whether a fresh time is what was kept, as far as it counts."""

    def differ(a: float, b: float, factor: float) -> bool:
        return max(a, b) > factor * min(a, b)

    if differ(fresh.before_ms, kept.before_ms, _SPEEDS):
        return False
    # How much slower something is was never measured well.
    either_faster = fresh.faster or kept.faster
    return not (either_faster and differ(fresh.share, kept.share, _SHARES))


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
            [t.share for _, t in anchors],
            [t.at_most_ms / t.before_ms for _, t in anchors],
        )
    )
    return LayerTime(before, after, most, *_doubts([t for _, t in anchors]))
