"""Timings that are made up: comparisons, and a machine whose clocks move where work is done."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from onnxlr.verify.latency import Comparison, Timing


def comparison(
    ratio: float, *, noise: float = 0.01, settled: bool = True, busy: float = 0.0
) -> Comparison:
    """Of what takes 1 ms with what is faster by a ratio."""
    a, b = (Timing(ms, ms, ms) for ms in (1.0, 1 / ratio))
    low, high = ratio * (1 - noise), ratio * (1 + noise)
    return Comparison(a, b, 9, ratio, low, high, settled, busy)


class FakeMachine:
    """One processor that a thread shares with others, slice by slice.

    Parameters
    ----------
    others : float
        Processes that take turns with the thread: twice the cores are two.
    noise : float
        Spread of the work itself, by cold caches and neighbours: exponential, so that now and then
        a run takes much longer and none is shorter than its cost.
    seed : int
    """

    slice_ms = 3.0

    def __init__(self, others: float = 0.0, noise: float = 0.05, seed: int = 0) -> None:
        self.wall = self.own = 0.0  # seconds
        self.others, self.noise = others, noise
        self.calls: list[str] = []
        self._rng = np.random.default_rng(seed)
        self._left = self.slice_ms
        self.waves = 0.05  # of the clock rate
        self.neighbour: dict[str, float] = {}  # by what factor work takes longer beside one
        self._comes, self._goes = 0.0, 0.0

    def work(self, name: str, ms: float) -> None:
        """Do some work; a neighbour, if there is one, comes and goes."""
        self.calls.append(name)
        wave = 1 + self.waves * np.sin(self.own * 30)
        if self.neighbour and self.own > self._goes:
            self._comes = self.own + self._rng.exponential(0.03)
            self._goes = self._comes + self._rng.exponential(0.03)
        beside = self.neighbour.get(name, 1.0) if self._comes < self.own else 1.0
        left = ms * wave * beside * (1 + self.noise * self._rng.exponential())
        while self.others and left > self._left:
            self._spend(self._left)
            left -= self._left
            self.wall += self.others * self.slice_ms / 1e3 * self._rng.exponential()
            left += 0.05  # what was in the caches is gone
            self._left = self.slice_ms * self._rng.uniform(0.5, 1.5)
        self._spend(left)
        self._left -= left

    def _spend(self, ms: float) -> None:
        self.wall += ms / 1e3
        self.own += ms / 1e3

    @contextmanager
    def clocks(self) -> Iterator["FakeMachine"]:
        """Let the system's clocks be those of this machine."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("onnxlr.verify.rounds.time.perf_counter", lambda: self.wall)
            patch.setattr("onnxlr.verify.rounds.time.thread_time", lambda: self.own)
            yield self
