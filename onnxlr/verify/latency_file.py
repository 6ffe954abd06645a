"""What a latency table holds: rows of milliseconds by use of a layer, method and rank, as JSON."""

import contextlib
import os
import platform
import re
from pathlib import Path
from typing import Any

from onnxlr.system.runtime import runtime_version
from onnxlr.system.session import Machine

# Of ranks, and of a time: beyond that a table is none.
_RANK, _LONGEST_MS = r"[1-9][0-9]{0,7}(,[1-9][0-9]{0,7})*", 1e9

Ranks = dict[str, list[float] | None]  # the fields of a time by rank; None: it can't be run
Times = dict[str, dict[str, Ranks]]  # by signature of a use, and method
Key = tuple[str, str, str]  # of a row: the signature of a use, the method and the rank


def is_table(content: dict[str, Any]) -> bool:
    """Whether this is the content of a table."""
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


def ranks_of(times: Times, key: Key) -> Ranks:
    """The rows of a use and a method, which are added if there are none."""
    use, method, _ = key
    return times.setdefault(use, {}).setdefault(method, {})


def parse_rank(text: str) -> tuple[int, ...]:
    """A rank as it stands in a table."""
    return tuple(map(int, text.split(",")))


def describe(machine: Machine) -> dict[str, Any]:
    """What a time depends on besides the layer, as it stands in a table."""
    known: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "onnxruntime": runtime_version(),
        "provider": machine.provider,
        "threads": machine.threads,
    }
    # As JSON gives them back; tables of before have neither.
    if machine.options:
        known["options"] = {name: dict(pairs) for name, pairs in machine.options}
    if machine.libraries:
        known["libraries"] = dict(machine.libraries)
    return known


def processor() -> str:
    """The processor's name as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _is_rank(text: str) -> bool:
    return re.fullmatch(_RANK, text) is not None


def _is_time(ms: object) -> bool:
    return ms is None or (
        isinstance(ms, list)
        and len(ms) == 3
        and all(isinstance(m, (int, float)) and 0 < m < _LONGEST_MS for m in ms)
    )
