"""Blocks of runs timed in turn, in groups of rounds of which the best counts.

Two things make a time on a busy machine worthless, and each has its remedy here:

- Other processes take turns on the processor, in slices of some milliseconds. A session with one
  thread on the CPU runs in the thread that calls it, so that this thread's own processor time is
  what it would take without them. It is what counts where the system's clock of it is fine enough.
  Elsewhere the clock on the wall counts, over blocks that are shorter than a slice: most of them
  are disturbed, and the best of a group seldom is.
- What comes back from such a wait finds its caches cold, and neighbours on the same core and on
  the same memory slow everything down. That comes and goes: each round times every function, the
  best of a few rounds in a row leaves out what was cold, and ratios are taken within them. Since
  neighbours may stay for longer, groups get larger the more rounds there are, of such rows that are
  spread over all of the time.

All blocks last about the same, since the longer one would be disturbed more often.

The share of the time that the thread waited is also what tells a busy machine: it is that of these
timings and no other, and it is right in a container, whose load average is that of its host and
whose quota no list of processes shows.
"""

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Run = Callable[[], None]

BUSY = 0.1  # of the time: who waits longer for the processor is on a busy machine

_BLOCK_S = 5e-4  # far above the clock's resolution, and well below a slice of the scheduler
_ROW = 4  # rounds in a row, of which the best counts
_LONG_S = 0.02  # such blocks span several slices: the best of four is no better than the rest
_MOST_GROUPS = 35  # with more rows than that, groups are of several; odd: in both orders
_WARMING = 2
_CALIBRATING = 5
_SHORTEST_S = 1e-7
_DISTURBED = 1.5  # times the best of all: what is above it was waiting, by the clock on the wall
_FINE_S, _STEPS, _READINGS = 2e-5, 5, 10_000  # of a clock that shows the length of a block


class Rounds:
    """Some functions that are timed in turn (AB, BA, AB, …), after a warm-up of each.

    Parameters
    ----------
    runs : sequence of callable
    by_processor : bool
        Whether the time that the calling thread had on the processor counts, not the wall's clock.
    """

    def __init__(self, runs: Sequence[Run], *, by_processor: bool = False) -> None:
        self._runs, self._clock = runs, int(by_processor)
        once = [self._warm_up(run) for run in runs]
        length = max(_BLOCK_S, *once)
        self._counts = [max(1, round(length / seconds)) for seconds in once]
        self._size = 1 if length > _LONG_S else _ROW
        self._rows: list[NDArray[np.float64]] = []  # each of (rounds, functions, clocks)

    def add_row(self) -> None:
        """Time some more rounds in a row."""
        row = np.empty((self._size, len(self._runs), 2))
        for i in range(self._size):
            order = range(len(self._runs))
            for side in order if (self.count + i) % 2 == 0 else reversed(order):
                row[i, side] = _time(self._runs[side], self._counts[side])
        self._rows.append(row)

    @property
    def count(self) -> int:
        """Rounds made so far."""
        return self._size * self.rows

    @property
    def rows(self) -> int:
        """Rows of rounds made so far."""
        return len(self._rows)

    @property
    def best(self) -> NDArray[np.float64]:
        """Milliseconds of one run in the best block of each group, of shape (groups, functions)."""
        return best_of_groups(np.stack([row[:, :, self._clock].min(axis=0) for row in self._rows]))

    @property
    def on_the_wall(self) -> NDArray[np.float64]:
        """Milliseconds of one run with all waiting, of shape (rounds, functions)."""
        return np.concatenate(self._rows)[:, :, 0]

    @property
    def busy(self) -> float:
        """Share of the time that was spent waiting for other processes."""
        times = np.concatenate(self._rows) * np.array(self._counts)[:, None]  # of whole blocks
        wall, own = times[:, :, 0], times[:, :, 1]
        if not self._clock:  # what the thread waits for may be other threads of its session
            own = np.minimum(wall, _DISTURBED * wall.min(axis=0))
        return max(0.0, float(1 - own.sum() / wall.sum()))

    def _warm_up(self, run: Run) -> float:
        """Seconds of one run, once it is warm."""
        for _ in range(_WARMING):
            run()
        once = min(_time(run, 1)[self._clock] for _ in range(_CALIBRATING)) / 1e3
        return max(once, _SHORTEST_S)


def best_of_groups(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least of each group, for each function; a group is a row, or some that are far apart.

    Parameters
    ----------
    rows : ndarray of shape (rows, functions)
        The least of each row.
    """
    groups = min(len(rows), _MOST_GROUPS)
    return np.stack([rows[i::groups].min(axis=0) for i in range(groups)])


@functools.cache
def has_fine_processor_clock() -> bool:
    """Whether a thread's processor time is counted in steps that are short beside a block.

    Systems say what unit the clock has, not how often it moves (every 16 ms on Windows, say).
    """
    steps, last = [], time.thread_time()
    for _ in range(_READINGS):
        now = time.thread_time()
        if now > last:
            steps.append(now - last)
        last = now
        if len(steps) == _STEPS:
            return bool(np.median(steps) < _FINE_S)
    return False


def _time(run: Run, count: int) -> tuple[float, float]:
    """Milliseconds of one run over ``count`` in a row: on the wall, and on the processor."""
    wall, own = time.perf_counter(), time.thread_time()
    for _ in range(count):
        run()
    own, wall = time.thread_time() - own, time.perf_counter() - wall
    return wall * 1e3 / count, own * 1e3 / count
